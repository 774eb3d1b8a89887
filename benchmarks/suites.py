"""The suites: which shapes are measured, as tables. `cases()` turns lines of a table into cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .case import DEFAULT_MODES, SINGLE_STEPS, Case


@dataclass(frozen=True)
class Line:
    """One line of a suite: a shape, and the cells and modes it is measured in."""

    cells: tuple[str, ...]
    T: int
    B: int
    I: int
    H: int
    modes: tuple[str, ...] = DEFAULT_MODES
    layers: int = 1
    bidirectional: bool = False
    lengths: str = "dense"
    note: str = ""


THREE = ("lstm", "gru", "rnn")


def square(cells: tuple[str, ...], T: int, B: int, H: int, **extra) -> Line:
    """A line whose input size equals its hidden size."""
    return Line(cells, T, B, H, H, **extra)


CORE_SHAPES = (
    (1, 1, 128),
    (50, 1, 128),
    (50, 1, 512),
    (50, 32, 128),
    (50, 32, 512),
    (100, 64, 256),
    (25, 64, 1024),
    (200, 8, 256),
    (1024, 16, 768),
    (100, 256, 256),
)

# About a minute on two cores: every cell, both modes, from one call of 10 us to one of 100 ms.
QUICK = (
    *(square(THREE, *shape) for shape in ((1, 1, 128), (50, 1, 128), (50, 32, 128), (100, 64, 256))),
    *(square(SINGLE_STEPS, 1, B, H) for B in (1, 32) for H in (128, 256)),
    square(THREE, 100, 16, 128, lengths="varied"),
)

CORE = tuple(square(THREE, *shape) for shape in CORE_SHAPES)

CELLS = (
    *(square(SINGLE_STEPS, 1, B, H) for B in (1, 8, 32, 128) for H in (64, 128, 256, 512, 1024)),
    # A decoder's loop: what a step costs when Python drives the time.
    *(square(SINGLE_STEPS, 50, B, 128) for B in (1, 32)),
)

# The dense line beside each packed one is its control: a frame should cost the same in all three.
PACKED = tuple(
    square(THREE, T, B, H, lengths=lengths)
    for T, B, H in ((200, 32, 128), (100, 64, 256), (50, 8, 512), (500, 16, 64))
    for lengths in ("dense", "equal", "varied")
)

PAPERS = (
    square(("lstm",), 1024, 16, 768, note="FlashRNN, figure of head dimension 768"),
    # Haste's own benchmark runs T=50 and sweeps the hidden size too; 512 stands for it here.
    *(
        Line(("lstm", "gru"), 50, N, C, 512, note=f"Haste N{N} C{C}")
        for N in (1, 32, 64, 128)
        for C in (64, 128, 256, 512)
    ),
    square(("lstm",), 100, 64, 512, layers=4, note="Appleyard et al. 2016"),
    square(("lstm", "gru"), 128, 128, 256, note="TorchRL"),
    square(("lstm",), 35, 20, 650, layers=2, note="word language model, medium"),
    square(("lstm",), 70, 80, 1150, note="AWD-LSTM, the middle layer"),
    Line(("lstm",), 500, 32, 80, 320, layers=5, bidirectional=True, note="speech BiLSTM"),
)

_TRAIN = ("train",)
_INFER = ("infer",)
_GRU_LENGTHS = (1500, 750, 375, 187)
_GRU_SIZES = (2816, 2048, 1536, 2560)

DEEPBENCH = (
    # Training. DeepBench's "vanilla" cell is cuDNN's CUDNN_RNN_RELU.
    *(square(("rnn_relu",), 50, B, H, modes=_TRAIN) for H in (1760, 2048, 2560) for B in (16, 32, 64, 128)),
    *(square(("lstm",), 25, B, H, modes=_TRAIN) for H in (512, 1024, 2048, 4096) for B in (16, 32, 64, 128)),
    *(square(("lstm",), 50, B, 1536, modes=_TRAIN) for B in (8, 16, 32)),
    *(square(("lstm",), 150, B, 256, modes=_TRAIN) for B in (16, 32, 64)),
    *(square(("gru",), T, 32, H, modes=_TRAIN) for H in _GRU_SIZES for T in _GRU_LENGTHS),
    square(("gru",), 1, 32, 512, modes=_TRAIN),
    *(square(("gru",), 1500, B, 1024, modes=_TRAIN) for B in (32, 64)),
    # Inference on a server.
    *(square(("lstm",), 25, B, H, modes=_INFER) for H in (512, 1024, 2048) for B in (1, 2, 4)),
    *(square(("lstm",), 50, B, 1536, modes=_INFER) for B in (1, 2, 4)),
    *(square(("lstm",), 150, B, 256, modes=_INFER) for B in (1, 2, 4)),
    *(square(("gru",), T, B, H, modes=_INFER) for H in _GRU_SIZES for B in (1, 2, 4) for T in _GRU_LENGTHS),
    *(square(("gru",), 1, B, 512, modes=_INFER) for B in (1, 2, 4)),
    *(square(("gru",), 1500, B, 1024, modes=_INFER) for B in (1, 2, 4)),
)

SUITES: dict[str, tuple[Line, ...]] = {
    "quick": QUICK,
    "core": CORE,
    "deepbench": DEEPBENCH,
    "papers": PAPERS,
    "cells": CELLS,
    "packed": PACKED,
}


def cases(
    lines: Iterable[Line],
    *,
    device: str,
    dtypes: Iterable[str],
    modes: Iterable[str] = DEFAULT_MODES,
    only_cells: Iterable[str] | None = None,
    graph: bool = False,
) -> Iterator[Case]:
    """Every case of these lines, line by line, so that a run that stops early has seen every cell.

    `graph` adds a graph-captured twin after each eager case. What is trained can be trained with a penalty.
    """
    wanted = None if only_cells is None else set(only_cells)
    for line in lines:
        for dtype in dtypes:
            for cell in line.cells:
                if wanted is not None and cell not in wanted:
                    continue
                for mode in modes:
                    if ("train" if mode == "penalty" else mode) not in line.modes:
                        continue
                    for captured in (False, True) if graph else (False,):
                        yield Case(
                            cell, mode, dtype, device, line.T, line.B, line.I, line.H,
                            line.layers, line.bidirectional, line.lengths, captured, line.note,
                        )  # fmt: skip
