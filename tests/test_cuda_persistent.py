"""The persistent CUDA kernels, emulated, one by one against float64: every tier, cell and dtype, both passes, at the
edges of their tiles. That removing a barrier or a check is found: test_cuda_persistent_mistakes.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from emulation import build
from emulation.device import Emulated
from persistent_layer import CELLS, NUMBERS, Layer, attach, tile

# Tiles by name: exchange, warps that share sums, eights of batch rows.
TILES = {
    "block": ("block", 1, 1),
    "cluster 2": ("cluster", 2, 2),
    "cluster 4": ("cluster", 4, 1),
    "grid 2": ("grid", 2, 1),
    "grid 4": ("grid", 4, 4),
    "grid 8": ("grid", 8, 3),
}
EXACT_TILES = ("block", "cluster 4", "grid 8")  # of fp32: tile_exists in csrc/cuda/persistent.h


@pytest.fixture(scope="module")
def machine() -> Emulated:
    kernels = sorted((build.CSRC / "cuda").glob("persistent_*.cu"))
    return attach(Emulated(build.library("persistent", [build.HERE / "persistent.cu", *kernels])))


@pytest.fixture(autouse=True)
def schedule(machine: Emulated) -> Iterator[None]:
    machine.seed(1)
    machine.library.frnn_emulation_set_yield_probability(0.005)
    yield
    machine.library.frnn_emulation_set_yield_probability(0.0)


def check(layer: Layer, name: str, cuts: tuple[int, ...] = ()) -> None:
    """Within a rounding of what is stored or multiplied for every second step; gradients within twice that, measured by
    the largest of their kind, since a large one passes through sums with small ones."""
    shape = tile(*TILES[name])
    bound = layer.rounding * (1 + layer.T / 2)
    states, gradients = layer.reference()
    found = layer.forward(shape, cuts)
    for ours, theirs in zip(found[: 3 if layer.cell == "lstm" else 2], states, strict=False):
        torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound)
    for key, ours in layer.backward(shape).items():
        theirs = gradients[key]
        scale = 2 * bound * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(
    "numbers, name", [(n, name) for n in NUMBERS for name in (EXACT_TILES if n == "fp32" else TILES)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_every_tile(machine: Emulated, cell: str, numbers: str, name: str) -> None:
    """Packed, both directions, reset, in one launch and in three."""
    layer = Layer(machine, cell, numbers, T=5, B=11, H=33, D=2, packed=True, reset=True)
    check(layer, name)
    once = layer.forward(tile(*TILES[name]))
    again = layer.forward(tile(*TILES[name]), cuts=(2, 3))
    for a, b in zip(once[: 3 if cell == "lstm" else 2], again, strict=False):
        assert torch.equal(a, b)


# One unit, one less than a word, one more than a block or a run; each tier up to where it needs several blocks.
HIDDEN = {
    "block": (1, 7, 64, 65, 128),
    "cluster 2": (1, 65, 129, 200, 256),
    "cluster 4": (7, 200, 270),  # more blocks than CUDA promises room for in a cluster
    "grid 2": (65, 200),
    "grid 4": (7, 129),
    "grid 8": (1, 130, 260),
}


@pytest.mark.parametrize("name, H", [(name, H) for name, sizes in HIDDEN.items() for H in sizes])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_hidden_sizes(machine: Emulated, cell: str, name: str, H: int) -> None:
    check(Layer(machine, cell, "bf16", T=2, B=3, H=H, seed=H), name)
    reach = {"block": 64, "cluster 2": 128, "grid 2": 128}.get(name, 256)
    if reach >= H:
        check(Layer(machine, cell, "tf32", T=2, B=3, H=H, seed=H), name)
        if name in EXACT_TILES:  # one row more than are multiplied at once
            check(Layer(machine, cell, "fp32", T=2, B=5, H=H, seed=H), name)


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_and_many(machine: Emulated, cell: str, name: str) -> None:
    """Also without states and biases, and with a batch of exactly one tile."""
    rows = 8 * TILES[name][2]
    check(Layer(machine, cell, "fp16", T=1, B=2, H=10, D=2, states=False, bias=False), name)
    check(Layer(machine, cell, "fp16", T=17, B=rows, H=18), name)


@pytest.mark.parametrize("name", TILES)
def test_no_schedule_changes_a_bit(machine: Emulated, name: str) -> None:
    machine.library.frnn_emulation_set_yield_probability(0.05)
    results = []
    for seed in range(4):
        machine.seed(seed)
        layer = Layer(machine, "gru", "bf16", T=4, B=9, H=66, D=2, packed=True)
        results.append([*layer.forward(tile(*TILES[name]))[:2], *layer.backward(tile(*TILES[name])).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_finite_stays_in_its_row(machine: Emulated) -> None:
    for name in TILES:
        layer = Layer(machine, "lstm", "bf16", T=3, B=4, H=34)
        layer.h0[0, 1] = float("nan")
        output, _, _ = layer.forward(tile(*TILES[name]))
        broken = output.view(3, 4, 34).isnan()
        assert broken[:, 1].all() and not broken[:, [0, 2, 3]].any()


def test_how_many_replicas_fit(machine: Emulated) -> None:
    """On an H200, but for registers: the emulation does not count them."""

    def residents(name: str, H: int) -> int:
        shape = tile(*TILES[name])
        return machine.library.persistent_residents(0, 0, 3, ctypes.byref(shape), ctypes.c_int64(H))

    machine.library.persistent_residents.restype = ctypes.c_int64
    for name in TILES:
        assert residents(name, 16) > 0
    assert residents("grid 8", 1024) == residents("grid 8", 16) // 64
