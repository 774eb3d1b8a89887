"""Every CUDA kernel on the smallest shapes that reach all of its code: what `make gpu-check` runs under
compute-sanitizer, where the whole suite would take hours. The numbers are held against torch.nn on the CPU, so that
the GPU runs nothing but our own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import parity
import pytest
from parity import (
    CELLS,
    DTYPES,
    KINDS,
    MORE,
    RNN_CELL_RELU,
    RNN_RELU,
    Kind,
    Values,
    assert_law,
    count_terms,
    leaves,
    make_twins,
    pack,
    run,
    upcast,
)
from persistent_checks import TIERS, Place, check, places_and_numbers
from test_cuda_persistent_scan import NUMBERS, problem
from test_ops import CELLS as CELL_NAMES
from torch import Tensor, nn

Judged = tuple[
    tuple[Values, Values, Values], int
]  # ours, torch.nn's, exact; and the terms of the longest sum

# input size, hidden size and batch: with 16-byte accesses and without; the fused kernel's one, four and eight rows at a
# time, and more rows than it takes
SHAPES = ((8, 16, 1), (3, 5, 3), (8, 16, 6), (3, 5, 9), (8, 16, 9))


def moved(value, device: str):
    """The same leaves on another device; of values, tensors without a graph."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return None if value is None else tuple(moved(item, device) for item in value)


def run_on(device: str, module: nn.Module, x: Tensor, hx, **how) -> Values:
    """`parity.run` of a module, on another device and brought back."""
    values = run(copy.deepcopy(module).to(device), moved(x, device), moved(hx, device), **how)
    return moved(values, "cpu")


def judge(draw: Callable[[int], Judged], draws: int) -> None:
    """The tolerance law over so many draws, or over many more where those may have been bad luck."""
    runs, terms = zip(*map(draw, range(draws)), strict=True)
    try:
        assert_law(*runs, terms=max(terms))
    except AssertionError:
        runs += tuple(draw(seed)[0] for seed in range(draws, MORE * draws))
        assert_law(*runs, terms=max(terms))


def draw_twins(kind: Kind, seed: int, *sizes: int, **options) -> parity.Twins:
    twins = make_twins(kind, *sizes, seed=seed, **options)
    if kind in (RNN_RELU, RNN_CELL_RELU) and options["dtype"].itemsize == 2:
        twins.apply(parity._keep_away_from_zero)
    return twins


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_small(kind, dtype, backend):
    def draw(seed: int, shape: tuple[int, int, int]) -> Judged:
        inputs, hidden, batch = shape
        options = {} if kind in CELLS else {"bidirectional": True}
        twins = draw_twins(kind, seed, inputs, hidden, dtype=dtype, **options)
        x, hx = leaves(twins.ours, 3, batch)
        if kind in (RNN_RELU, RNN_CELL_RELU):
            x = x.detach().abs().requires_grad_()
        how = {} if kind in CELLS or batch == 9 else {"form": pack([3 - row % 3 for row in range(batch)])}
        values = (
            run_on(backend, twins.ours, x, hx, **how),
            run(twins.theirs, x, hx, **how),
            run(twins.exact, upcast(x), upcast(hx), **how),
        )
        return values, count_terms(twins.ours, x)

    judge(lambda index: draw(index // len(SHAPES), SHAPES[index % len(SHAPES)]), 2 * len(SHAPES))


# B, I, H: one row and one unit; rows that fill no tile; blocks that exchange, of a cluster and of a grid.
PERSISTENT_SHAPES = ((1, 1, 1), (9, 3, 20), (9, 3, 70))


@places_and_numbers("bf16")
@pytest.mark.parametrize("shape", PERSISTENT_SHAPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_small_persistent(cell, numbers, tier, shape, place: Place):
    B, I, H = shape
    if H == 70 and tier == "block":
        H = 64  # what it reaches in float32
    with place.open(numbers):
        options = {"directions": 2, "packed": B > 1, "dtype": NUMBERS[numbers]}
        check(place, cell, problem(cell, 3, B, I, H, **options), tier)
