"""The tangent scan on the tiles of Intel AMX: on emulated tiles (tests/amx), and on a CPU that has them."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from test_amx_backward import as_dtype
from test_ops import CELLS, make_layer
from tiles import assert_float_law, build_kernels, on_hardware
from torch import Tensor

from fused_rnn import _C, ops

Scan = Callable[..., dict[str, Tensor | None]]

SIZES = (1, 7, 16, 17, 33, 65, 129)  # of H: below, at and above a vector, a tile's k, and several of both
ROWS = (1, 7, 16, 17, 33, 70, 150)  # one row of tiles, whole and not; two; several, more than a block's
CHANGES = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    kernels = ["kernels_amx_float", "kept_panels", "plan", "scratch", "team"]
    return build_kernels(tmp_path_factory.mktemp("amx"), "tangent", kernels)


class Case:
    """What a tangent scan of one layer is given: the changes of all arguments that are there and named."""

    def __init__(self, cell: str, T: int, B: int, H: int, I: int = 35, changes=CHANGES, **form) -> None:
        self.cell = cell
        self.arguments = make_layer(cell, T, B, I, H, dtype=torch.float32, **form)
        self.output, _, _, self.saved = ops.layer_forward(cell, *self.arguments, True)
        x, _, *others = self.arguments
        names = ("x", "h0", "c0", *("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") * 2)
        self.changes = [
            torch.randn_like(t) if t is not None and name in changes else None
            for name, t in zip(names, (x, *others), strict=True)
        ]

    def to(self, dtype: torch.dtype) -> Case:
        other = object.__new__(Case)
        for name, value in vars(self).items():
            setattr(other, name, as_dtype(value, dtype))
        return other


def by_operator(case: Case, isa: str, parts: int = 3) -> dict[str, Tensor | None]:
    """The operator whose first results are the scan's; the backward pass that it is a derivative of is not read."""
    _C.set_isa(isa)
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if parts == 3 else "high")
    x, sizes, *others = case.arguments
    D = 2 if case.arguments[9] is not None else 1
    dh = case.output.new_zeros(D, case.output.numel() // case.output.size(-1), case.output.size(-1) // D)
    needs = 7 if case.cell == "lstm" else 3
    try:
        found = ops.layer_double_backward(
            case.cell, dh, None, x, sizes, *others, *case.changes, case.output, case.saved, needs
        )
    finally:
        torch.set_float32_matmul_precision(kept)
    return dict(zip(("output", "hn", "cn"), found[:3], strict=True))


class Tensors(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "h0", "c0", "output", "saved")),
        *((name, ctypes.c_void_p) for name in ("x_tangent", "h0_tangent", "c0_tangent")),
        *((name, ctypes.c_void_p) for name in ("output_tangent", "hn_tangent", "c_tangent", "saved_tangent")),
        ("weights", ctypes.c_void_p * 4),
        ("changes", ctypes.c_void_p * 8),
    ]


def emulated(function: Callable, case: Case, parts: int = 3) -> dict[str, Tensor | None]:
    x, sizes, h0, c0, *weights = case.arguments
    v_x, v_h0, v_c0, *v = case.changes
    D, H = 2 if weights[5] is not None else 1, weights[1].size(1)
    if sizes is None:
        sizes = torch.full((x.size(0),), x.size(1))
    T, B, N = len(sizes), int(sizes[0]), int(sizes.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    lengths = (sizes[None, :] > torch.arange(B)[:, None]).sum(1)
    output, hn = torch.full_like(case.output, torch.nan), torch.full((D, B, H), torch.nan)
    saved = torch.full_like(case.saved, torch.nan)
    cn = None
    if case.cell == "lstm":
        cn = torch.zeros(D, B, H) if v_c0 is None else v_c0.clone()

    def pointers(*tensors: Tensor | None) -> list[int | None]:
        return [None if t is None else t.data_ptr() for t in tensors]

    left = function(
        case.cell.encode(),
        (ctypes.c_int64 * 6)(T, B, x.size(-1), H, D, N),
        *(ctypes.c_void_p(t.data_ptr()) for t in (sizes, offsets, lengths)),
        ctypes.byref(
            Tensors(
                *pointers(x, h0, c0, case.output, case.saved, v_x, v_h0, v_c0, output, hn, cn, saved),
                (ctypes.c_void_p * 4)(*pointers(*weights[:2], *weights[5:7])),
                (ctypes.c_void_p * 8)(*pointers(*v[:4], *v[5:9])),
            )
        ),
        torch.get_num_threads(),
        parts,
    )
    assert left == 0, "a thread has not given its tiles back"
    return {"output": output, "hn": hn, "cn": cn}


@pytest.fixture(params=["emulated", "hardware"])
def amx(request: pytest.FixtureRequest) -> Scan:
    if request.param == "emulated":
        return functools.partial(emulated, request.getfixturevalue("library").frnn_amx_tangent)
    return on_hardware(by_operator)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "T, B, H, threads, form",
    [
        (5, 33, 257, 1, {"directions": 2}),
        (4, 70, 256, 3, {"states": False}),
        (3, 150, 260, 1, {"packed": True}),
        (90, 7, 256, 2, {"packed": True, "directions": 2}),  # so few rows: in blocks alone
        (5, 40, 260, 1, {"changes": ("x",)}),
        (5, 40, 260, 1, {"changes": ("w_hh", "b_hh")}),
        (5, 40, 260, 1, {"changes": ("h0", "w_ih")}),
        (5, 40, 260, 1, {"changes": ("c0", "b_ih")}),
    ],
)
def test_float_keeps_the_law(cell: str, T: int, B: int, H: int, threads: int, form: dict, amx: Scan) -> None:
    """Layers that go this way by themselves."""
    torch.set_num_threads(threads)
    assert_float_law(amx, by_operator, *(Case(cell, T, B, H, **form) for _ in range(2)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", SIZES)
def test_float_of_odd_sizes_keeps_the_law(cell: str, H: int, library: ctypes.CDLL) -> None:
    forms = itertools.cycle(itertools.product((1, 3), (1, 2), (True, False), (True, False)))
    for (B, T), (threads, directions, states, packed) in zip(
        itertools.product(ROWS, (1, 4)), forms, strict=False
    ):
        torch.set_num_threads(threads)
        draws = min(64, max(2, 1000 // (B * H)))  # few numbers say nothing of the accuracy
        form = {"packed": packed and T > 1, "directions": directions, "states": states}
        cases = [Case(cell, T, B, H, I=(3, 63, 64, 1)[B % 4], **form) for _ in range(draws)]
        assert_float_law(functools.partial(emulated, library.frnn_amx_tangent), by_operator, *cases)


@pytest.mark.parametrize("cell", CELLS)
def test_float_in_two_parts_is_less_accurate(cell: str, amx: Scan) -> None:
    case = Case(cell, 5, 32, 256)
    exact = by_operator(case.to(torch.float64), "portable")["output"]
    two, three = ((amx(case, parts=parts)["output"] - exact).abs().max() for parts in (2, 3))
    assert 4 * three < two < 2**-12 * exact.abs().max()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e20])
@pytest.mark.parametrize("changes", [("x",), ("w_ih", "w_hh"), CHANGES])
def test_changes_of_any_size_keep_the_law(cell: str, scale: float, changes: tuple, amx: Scan) -> None:
    """Tiles take denormal numbers as zero, and changes fade with every step."""
    cases = []
    for _ in range(2):
        case = Case(cell, 4, 40, 260, changes=changes)
        case.changes = [None if v is None else v * scale for v in case.changes]
        cases.append(case)
    assert_float_law(amx, by_operator, *cases)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "w_hh"])
def test_changes_that_have_no_parts(cell: str, value: float, where: str, amx: Scan) -> None:
    """Their parts would be NaN: the scan is right all the same."""
    case = Case(cell, 4, 40, 260)
    if where == "x":
        case.changes[0][2, 7, 3] = value
    else:
        case.changes[4][5, 3] = value
    ours, theirs = amx(case), by_operator(case, "portable")
    for name, expected in theirs.items():
        if expected is None:
            continue
        assert torch.equal(ours[name].isnan(), expected.isnan()), name
        assert torch.equal(ours[name].isinf(), expected.isinf()), name
        finite = expected.isfinite()
        torch.testing.assert_close(ours[name][finite], expected[finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_runs_are_alike(cell: str, amx: Scan) -> None:
    case = Case(cell, 5, 70, 270, directions=2, packed=True)
    for threads in (1, 4):
        torch.set_num_threads(threads)
        first, again = amx(case), amx(case)
        assert all(torch.equal(first[k], again[k]) for k in first if first[k] is not None)
