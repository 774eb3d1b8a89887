"""Layers on the tiles of Intel AMX, in bfloat16 and in float32: on emulated tiles (tests/amx), and on a CPU that has
them.

The emulation is of the tile instructions alone: what surrounds them is in AVX512_BF16.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import assert_law
from test_ops import CELLS, make_layer
from tiles import ROOT, build_kernels
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _C, ops, reference

Layer = Callable[[str, list[Tensor | None]], tuple[Tensor, Tensor, Tensor | None]]

SIZES = (1, 7, 16, 17, 33, 65, 129)  # of H: below, at and above a vector, a tile's k, and several of both
ROWS = (1, 7, 8, 9, 16, 17, 33)  # without tiles; one row of tiles, whole and not; two; several pairs of them


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    kernels = ["kernels_amx", "kernels_amx_float", "kept_panels", "plan", "scratch", "team"]
    return build_kernels(tmp_path_factory.mktemp("amx"), "layers", kernels)


def test_the_check_before_first_use_passes(library: ctypes.CDLL) -> None:
    library.frnn_amx_tiles_multiply.restype = ctypes.c_bool
    assert library.frnn_amx_tiles_multiply()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
@pytest.mark.parametrize("optimized", ["-O0", "-O2"])
def test_the_assembly_is_what_the_emulation_does(tmp_path: Path, optimized: str) -> None:
    program = tmp_path / "instructions"
    flags = ["-std=c++17", optimized, "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, ROOT / "tests/amx/instructions.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def run_emulated(function: Callable, cell: str, arguments: list[Tensor | None], *last: int):
    """`last` are the function's last arguments."""

    def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    x, sizes, h0, c0, *weights = arguments
    D = 2 if weights[5] is not None else 1
    state, H = weights[1].size(1), weights[1].size(0) // ops.CELLS[cell].gates
    if sizes is None:
        sizes = torch.full((x.size(0),), x.size(1))
    T, B, N = len(sizes), int(sizes[0]), int(sizes.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    lengths = (sizes[None, :] > torch.arange(B)[:, None]).sum(1)
    output, hn = x.new_empty(*x.shape[:-1], D * state), x.new_empty(D, B, state)
    cn = None
    if cell == "lstm":
        cn = torch.zeros(D, B, H) if c0 is None else c0.float().clone()
    numbers = [T, B, x.size(-1), H, state if weights[4] is not None else 0, D, N]
    left = function(
        cell.encode(),
        (ctypes.c_int64 * 7)(*numbers),
        *map(pointer, (sizes, offsets, lengths, x, h0, cn)),
        (ctypes.c_void_p * 10)(*(pointer(w) for w in weights)),
        *map(pointer, (output, hn)),
        torch.get_num_threads(),
        *last,
    )
    assert left == 0, "a thread has not given its tiles back"
    return output, hn, cn


def on_hardware(cell: str, arguments: list[Tensor | None]):
    _C.set_isa("amx")
    return ops.layer_forward(cell, *arguments, False)[:3]


@pytest.fixture(params=["emulated", "hardware"])
def amx(request: pytest.FixtureRequest) -> Layer:
    if request.param == "emulated":
        function = request.getfixturevalue("library").frnn_amx_bfloat16
        return functools.partial(run_emulated, function)
    if "amx" not in _C.isas():
        pytest.skip("this CPU has no AMX")
    return on_hardware


def widened(arguments: list[Tensor | None]) -> list[Tensor | None]:
    return [a.double() if a is not None and a.is_floating_point() else a for a in arguments]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", SIZES)
def test_agrees_with_reference(cell: str, H: int, amx: Layer) -> None:
    forms = itertools.cycle(itertools.product((False, True), (1, 2), (True, False), (0, 5), (1, 3)))
    for (B, T), (packed, directions, states, proj, threads) in zip(
        itertools.product(ROWS, (1, 5)), forms, strict=False
    ):
        torch.set_num_threads(threads)
        arguments = make_layer(
            cell,
            T,
            B,
            I=(3, 63, 64, 1)[B % 4],
            H=H,
            directions=directions,
            proj=proj if cell == "lstm" and proj < H else 0,
            packed=packed and T > 1,
            states=states,
            dtype=torch.bfloat16,
        )
        output, hn, cn = amx(cell, arguments)
        expected = reference.layer(cell, *widened(arguments))
        # As in test_cpu_kernels.py: a few roundings of states about 1, or of some tens with relu.
        for ours, theirs in zip((output, hn, cn), expected, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", SIZES)
def test_one_step_of_exact_sums_has_the_bits_of_the_instructions_for_vectors(
    cell: str, H: int, amx: Layer
) -> None:
    """Operands on a coarse grid: no order of additions rounds, so that any other number is a mistake."""
    # The last has weights so long that they are multiplied as they lie.
    for B, I in ((8, 65), (9, 3), (16, 32), (17, 65), (33, 3), (20, 700)):
        arguments = make_layer(cell, 1, B, I, H, directions=2, dtype=torch.bfloat16)
        arguments = [a if a is None else (a * 16).round().clamp(-32, 32) / 16 for a in arguments]
        found = amx(cell, arguments)[0]
        _C.set_isa("avx512_bf16")
        expected = ops.layer_forward(cell, *arguments, False)[0]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_threads_have_tiles_of_their_own(cell: str, amx: Layer) -> None:
    arguments = make_layer(cell, 6, 70, 40, 100, directions=2, packed=True, dtype=torch.bfloat16)
    results = []
    for threads in (1, 4, 4):
        torch.set_num_threads(threads)
        results.append(amx(cell, arguments)[0])
    alone, together, again = results
    assert torch.equal(together, again)
    # Tiles are cut otherwise, and the few rows of a small one are multiplied in another order: a rounding of bfloat16.
    torch.testing.assert_close(alone, together, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_stay_in_their_rows(cell: str, value: float, amx: Layer) -> None:
    arguments = make_layer(cell, 4, 20, 5, 20, dtype=torch.bfloat16)
    arguments[0][1, 1, 2] = value
    ours = amx(cell, arguments)[0].double()
    theirs = reference.layer(cell, *widened(arguments))[0]
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=0.02, atol=0.03)


def float_on_hardware(cell: str, arguments: list[Tensor | None], parts: int = 3):
    _C.set_isa("amx")
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if parts == 3 else "high")
    try:
        return ops.layer_forward(cell, *arguments, False)[:3]
    finally:
        torch.set_float32_matmul_precision(kept)


def float_emulated(library: ctypes.CDLL) -> Callable:
    def layer(cell: str, arguments: list[Tensor | None], parts: int = 3):
        return run_emulated(library.frnn_amx_float, cell, arguments, parts)

    return layer


@pytest.fixture(params=["emulated", "hardware"])
def amx_float(request: pytest.FixtureRequest) -> Callable:
    if request.param == "emulated":
        return float_emulated(request.getfixturevalue("library"))
    if "amx" not in _C.isas():
        pytest.skip("this CPU has no AMX")
    return float_on_hardware


def values(output: Tensor, hn: Tensor, cn: Tensor | None) -> dict[str, Tensor | None]:
    """The operator's cn is empty, torch's None, where the cell has none."""
    return {"output": output, "hn": hn, "cn": cn if cn is not None and cn.numel() else None}


def by_torch(cell: str, arguments: list[Tensor | None]) -> dict[str, Tensor | None]:
    x, sizes, h0, c0, *weights = arguments
    cls = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, nn.RNN)
    options = {"nonlinearity": cell.removeprefix("rnn_")} if cls is nn.RNN else {}
    D = 2 if weights[5] is not None else 1
    H = weights[1].size(1)
    module = cls(x.size(-1), H, bidirectional=D == 2, **options).to(x.dtype)
    given = [w for w in weights if w is not None]
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), given, strict=True):
            parameter.copy_(weight)
        hx = h0 if cell != "lstm" or h0 is None else (h0, c0)
        output, state = module(x if sizes is None else PackedSequence(x, sizes), hx)
    hn, cn = state if cell == "lstm" else (state, None)
    return values(output if sizes is None else output.data, hn, cn)


def assert_float_law(cell: str, layer: Callable, *layers: list[Tensor | None]) -> None:
    assert_law(
        *(
            (values(*layer(cell, arguments)), by_torch(cell, arguments), by_torch(cell, widened(arguments)))
            for arguments in layers
        )
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "T, B, I, H, threads, form",
    [
        (5, 33, 35, 257, 1, {"directions": 2}),
        (4, 70, 130, 256, 3, {"states": False}),
        (3, 150, 1, 260, 1, {"packed": True, "states": False}),
    ],
)
def test_float_keeps_the_law(
    cell: str, T: int, B: int, I: int, H: int, threads: int, form: dict, amx_float: Callable
) -> None:
    """Layers that go this way by themselves."""
    torch.set_num_threads(threads)
    layers = [make_layer(cell, T, B, I, H, dtype=torch.float32, **form) for _ in range(2)]
    assert_float_law(cell, amx_float, *layers)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", SIZES)
def test_float_of_odd_sizes_keeps_the_law(cell: str, H: int, library: ctypes.CDLL) -> None:
    forms = itertools.cycle(itertools.product((1, 3), (1, 2), (True, False)))
    for (B, T), (threads, directions, states) in zip(itertools.product(ROWS, (1, 3)), forms, strict=False):
        torch.set_num_threads(threads)
        draws = min(64, max(2, 1000 // (B * H)))  # few numbers say nothing of torch.nn's accuracy
        form = {"packed": T > 1, "directions": directions, "states": states, "dtype": torch.float32}
        layers = [make_layer(cell, T, B, (3, 63, 64, 1)[B % 4], H, **form) for _ in range(draws)]
        assert_float_law(cell, float_emulated(library), *layers)


@pytest.mark.parametrize("cell", CELLS)
def test_float_in_two_parts_is_less_accurate(cell: str, amx_float: Callable) -> None:
    arguments = make_layer(cell, 5, 32, 64, 256, dtype=torch.float32)
    exact = reference.layer(cell, *widened(arguments))[0]
    two, three = ((amx_float(cell, arguments, parts)[0] - exact).abs().max() for parts in (2, 3))
    assert 4 * three < two < 2**-14 * exact.abs().max()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
@pytest.mark.parametrize("where", ["x", "h0", "w_hh"])
def test_float_that_does_not_split(cell: str, value: float, where: str, amx_float: Callable) -> None:
    """Its parts would be NaN, or their products overflow: the layer is right all the same."""
    arguments = make_layer(cell, 4, 40, 33, 260, dtype=torch.float32)
    if where == "x":
        arguments[0][2, 7, 3] = value
    else:
        arguments[2 if where == "h0" else 5].view(-1, 260)[7, 3] = value
    ours = amx_float(cell, arguments)[0]
    theirs = reference.layer(cell, *arguments)[0]
    if cell == "rnn_relu" and value == 3.4e38:  # what overflows later depends on the order of a sum
        ours, theirs = ours[:3], theirs[:3]
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    finite = theirs.isfinite()
    largest = max(1.0, theirs[finite].abs().max().item())
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("of_x, of_weights", [(1e-31, 1.0), (1.0, 1e-31), (3e-16, 3e-16)])
def test_float_whose_parts_are_denormal_keeps_the_law(
    of_x: float, of_weights: float, amx_float: Callable
) -> None:
    """Tiles take denormal numbers as zero. A relu layer without biases keeps the scale of its input."""
    runs = []
    for _ in range(3):
        arguments = make_layer("rnn_relu", 4, 32, 64, 256, bias=False, states=False, dtype=torch.float32)
        arguments[0] *= of_x
        arguments[4] *= of_weights
        exact = reference.layer("rnn_relu", *widened(arguments))
        theirs = reference.layer("rnn_relu", *arguments)
        runs.append((values(*amx_float("rnn_relu", arguments)), values(*theirs), values(*exact)))
    assert_law(*runs)
