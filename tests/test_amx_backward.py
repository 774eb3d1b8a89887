"""The backward scan on the tiles of Intel AMX: on emulated tiles (tests/amx), and on a CPU that has them."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from parity import LAYERS, assert_parity
from test_ops import CELLS, make_layer
from test_reset import mask_for
from tiles import assert_float_law, build_kernels, on_hardware
from torch import Tensor

from fused_rnn import _C, ops

Scan = Callable[..., dict[str, Tensor | None]]

SIZES = (1, 7, 16, 17, 33, 65, 129)  # of H: below, at and above a vector, a tile's k, and several of both
ROWS = (1, 7, 16, 17, 33, 70, 150)  # one row of tiles, whole and not; two; several, more than a block's


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    kernels = ["kernels_amx_backward", "kernels_amx_backward_bf16", "kept_panels", "plan", "scratch", "team"]
    return build_kernels(tmp_path_factory.mktemp("amx"), "backward", kernels)


class Case:
    """What a backward scan of one layer is given; saved is of dtype float32 at least."""

    def __init__(self, cell: str, T: int, B: int, H: int, dtype: torch.dtype, **form) -> None:
        self.cell = cell
        self.through = form.pop("through", ("output", "hn", "cn"))
        resets = form.pop("resets", False)
        arguments = make_layer(cell, T, B, 3, H, dtype=dtype, **form)
        self.reset = mask_for(arguments) if resets else None
        output, hn, cn, saved = ops.layer_forward(cell, *arguments, True, self.reset)
        given = {"output": output, "hn": hn, "cn": cn if cell == "lstm" else None}
        self.gradients = [
            torch.randn_like(t) if t is not None and name in self.through else None
            for name, t in given.items()
        ]
        self.sizes, self.h0, self.c0 = arguments[1:4]
        self.weights, self.output, self.saved = arguments[4:], output, saved

    def to(self, dtype: torch.dtype) -> Case:
        other = object.__new__(Case)
        for name, value in vars(self).items():
            setattr(other, name, as_dtype(value, dtype))
        return other


def as_dtype(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, list):
        return [as_dtype(v, dtype) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def by_operator(case: Case, isa: str | None = None, parts: int = 3) -> dict[str, Tensor | None]:
    """The operator that returns what the scan does."""
    _C.set_isa(isa or _C.isas()[0])
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if parts == 3 else "high")
    try:
        dgates, _, dh0, dc0 = ops.layer_gate_gradients(
            case.cell,
            *case.gradients,
            case.sizes,
            case.h0,
            case.c0,
            *case.weights,
            case.output,
            case.saved,
            case.reset,
        )
    finally:
        torch.set_float32_matmul_precision(kept)
    return {"dgates": dgates, "dh0": dh0, "dc0": dc0 if dc0.numel() else None}


class Tensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("h0", "c0", "output", "saved", "grad_output", "grad_hn", "dgates", "dh"),
            *("carry", "dh0", "w_hh", "w_hh_reverse", "adds_carry", "adds_previous", "reset"),
        )
    ]


def emulated(
    function: Callable, case: Case, parts: int = 3, adds: tuple[Tensor, ...] = (None,) * 3
) -> dict[str, Tensor | None]:
    """`adds`: what is added to the gates' gradients, to the carry and to the gradients of h_{t-1}, [D, N, ...]."""
    traits = ops.CELLS[case.cell]
    output, w_hh, w_hh_reverse = case.output, case.weights[1], case.weights[6]
    D, H = 2 if w_hh_reverse is not None else 1, w_hh.size(1)
    sizes = case.sizes
    if sizes is None:
        sizes = torch.full((output.size(0),), output.size(1))
    T, B, N = len(sizes), int(sizes[0]), int(sizes.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    lengths = (sizes[None, :] > torch.arange(B)[:, None]).sum(1)
    grad_output, grad_hn, grad_cn = case.gradients
    dgates, dh0 = output.new_empty(D, N, traits.gate_grads * H), output.new_empty(D, B, H)
    if adds[0] is not None:
        dgates.copy_(adds[0])
    carry = torch.zeros(D, B, H)  # unused by cells without one
    if grad_cn is not None:
        carry = grad_cn.float().clone()
    dh = output.new_empty(D, N, H)
    tensors = (case.h0, case.c0, output, case.saved, grad_output, grad_hn, dgates, dh, carry, dh0)
    pointers = [
        None if t is None else t.data_ptr() for t in (*tensors, w_hh, w_hh_reverse, *adds[1:], case.reset)
    ]
    left = function(
        case.cell.encode(),
        (ctypes.c_int64 * 5)(T, B, H, D, N),
        *(ctypes.c_void_p(t.data_ptr()) for t in (sizes, offsets, lengths)),
        ctypes.byref(Tensors(*pointers)),
        torch.get_num_threads(),
        parts,
    )
    assert left == 0, "a thread has not given its tiles back"
    return {"dgates": dgates, "dh0": dh0, "dc0": carry if case.cell == "lstm" else None}


@pytest.fixture(params=["emulated", "hardware"])
def amx_float(request: pytest.FixtureRequest) -> Scan:
    if request.param == "emulated":
        library = request.getfixturevalue("library")
        return functools.partial(emulated, library.frnn_amx_backward_float)
    return on_hardware(by_operator)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "T, B, H, threads, form",
    [
        (5, 33, 257, 1, {"directions": 2}),
        (4, 70, 256, 3, {"states": False}),
        (3, 150, 260, 1, {"packed": True, "states": False}),
        (6, 40, 288, 2, {"packed": True, "directions": 2, "through": ("hn",)}),
        (6, 40, 256, 1, {"resets": True}),
        (5, 70, 260, 2, {"resets": True, "packed": True, "directions": 2}),
    ],
)
def test_float_keeps_the_law(
    cell: str, T: int, B: int, H: int, threads: int, form: dict, amx_float: Scan
) -> None:
    """Layers that go this way by themselves."""
    torch.set_num_threads(threads)
    assert_float_law(amx_float, by_operator, *(Case(cell, T, B, H, torch.float32, **form) for _ in range(2)))


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
        cases = [Case(cell, T, B, H, torch.float32, **form) for _ in range(draws)]
        assert_float_law(functools.partial(emulated, library.frnn_amx_backward_float), by_operator, *cases)


@pytest.mark.parametrize("cell", CELLS)
def test_float_in_two_parts_is_less_accurate(cell: str, amx_float: Scan) -> None:
    case = Case(cell, 5, 32, 256, torch.float32)
    exact = by_operator(case.to(torch.float64), "portable")["dh0"]
    two, three = ((amx_float(case, parts=parts)["dh0"] - exact).abs().max() for parts in (2, 3))
    assert 4 * three < two < 2**-13 * exact.abs().max()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_float_that_has_no_parts(cell: str, value: float, where: str, amx_float: Scan) -> None:
    """Its parts would be NaN, or their products overflow: the scan is right all the same."""
    case = Case(cell, 4, 40, 260, torch.float32)
    if where == "gradient":
        case.gradients[0][2, 7, 3] = value
    else:
        case.weights[1][5, 3] = 1e13 if value == 3e38 else value  # steps multiply it
    ours, theirs = amx_float(case), by_operator(case, "portable")
    for name, expected in theirs.items():
        if expected is None:
            continue
        found = ours[name]
        assert torch.equal(found.isnan(), expected.isnan()), name
        finite = expected.isfinite() & found.isfinite()  # what overflows depends on the order of a sum
        largest = max([1.0, *expected[finite].abs().flatten().tolist()])
        torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e20])
def test_gradients_of_any_size_keep_the_law(cell: str, scale: float, amx_float: Scan) -> None:
    """Tiles take denormal numbers as zero, and gradients fade with every step."""
    cases = []
    for _ in range(2):
        case = Case(cell, 4, 40, 260, torch.float32)
        case.gradients = [None if g is None else g * scale for g in case.gradients]
        cases.append(case)
    assert_float_law(amx_float, by_operator, *cases)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("T, B, H, threads", [(1, 5, 33, 1), (3, 40, 70, 2), (4, 70, 129, 1)])
def test_what_a_second_derivative_adds(cell: str, T: int, B: int, H: int, threads: int, library) -> None:
    """The scan is linear: what is added at a step arrives at the one before as its product with the weights does, or
    past it. Of one direction: the carry of an LSTM's cell state is told from others where it leaves the layer."""
    torch.set_num_threads(threads)
    case = Case(cell, T, B, H, torch.float32)
    traits = ops.CELLS[cell]
    scan = functools.partial(emulated, library.frnn_amx_backward_float)
    more, previous = torch.randn(1, T * B, traits.gate_grads * H), torch.randn(1, T * B, H)
    carried = torch.randn(1, T * B, H)
    if traits.cell_state:
        carried[:, B:] = 0
    found = scan(case, adds=(more, carried, previous))

    other = case.to(torch.float32)
    arrives = more[0, :, : traits.gates * H] @ case.weights[1] + previous[0]
    if cell == "gru":
        arrives = arrives + carried[0]
    grad_output = case.gradients[0].clone()
    grad_output[:-1] += arrives.view(T, B, H)[1:]
    other.gradients = [grad_output, *case.gradients[1:]]
    expected = scan(other)
    expected["dgates"] += more
    expected["dh0"] += arrives[:B]
    if traits.cell_state:
        expected["dc0"] += carried[:, :B]
    for name, theirs in expected.items():
        if theirs is not None:
            torch.testing.assert_close(found[name], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_runs_are_alike(cell: str, amx_float: Scan) -> None:
    case = Case(cell, 5, 70, 270, torch.float32, directions=2, packed=True)
    for threads in (1, 4):
        torch.set_num_threads(threads)
        first, again = amx_float(case), amx_float(case)
        assert all(torch.equal(first[k], again[k]) for k in first if first[k] is not None)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", SIZES)
def test_bfloat16_of_odd_sizes_agrees(cell: str, H: int, library: ctypes.CDLL) -> None:
    forms = itertools.cycle(itertools.product((1, 3), (1, 2), (True, False), (True, False)))
    for (B, T), (threads, directions, states, packed) in zip(
        itertools.product(ROWS, (1, 4)), forms, strict=False
    ):
        torch.set_num_threads(threads)
        form = {"packed": packed and T > 1, "directions": directions, "states": states}
        case = Case(cell, T, B, H, torch.bfloat16, **form)
        ours = emulated(library.frnn_amx_backward_bfloat16, case)
        expected = by_operator(case.to(torch.float64), "portable")
        for name, theirs in expected.items():
            if theirs is not None:  # a few roundings of the largest
                largest = max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(ours[name].double(), theirs, rtol=0.02, atol=0.02 * largest)


@pytest.mark.parametrize("kind", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["padded", "packed", "two directions", "last state"])
def test_layers_keep_the_law_beside_torch(kind, dtype: torch.dtype, form: str) -> None:
    """Of sizes that go this way by themselves, and not quite whole tiles."""
    if "amx" not in _C.isas():
        pytest.skip("this CPU has no AMX")
    _C.set_isa("amx")
    options: dict = {"lengths": [6] * 20 + [4] * 9 + [1] * 6} if form == "packed" else {}
    if form == "two directions":
        options["bidirectional"] = True
    if form == "last state":
        options["through"] = ["h_n"]
    assert_parity(kind, (35, 141), 6, 35, gradients=True, dtype=dtype, draws=1, **options)
