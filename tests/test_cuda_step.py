"""The CUDA backend's strategy "step" with emulated kernels, operator by operator against ``reference.py``: both of its
kernels at every edge of their tiles, all dtypes, the reset mask, many schedules. The modules above run in the broad
parity tests (``cuda-emulated`` in their names)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import emulated
import pytest
import torch
from emulated import forced
from test_ops import CELLS, gradients_by_reference, make_layer, wanted_bits
from test_reset import assert_reset
from torch import Tensor

import fused_rnn
from fused_rnn import _C, ops, reference

STRATEGIES = ("step_fused", "step")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    with emulated.unfair_schedules(), emulated.in_place_of_the_cpu(), emulated.a_gpu(arch=75):
        yield


def agree(cell: str, arguments: list[Tensor | None], dtype: torch.dtype, terms: int) -> None:
    """Results and gradients against the reference in float64, within a rounding of the dtype for every term of a sum
    of numbers of order 1."""
    output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
    exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
    expected = reference.layer(cell, *exact)
    gradients = [
        torch.randn(e.shape, dtype=torch.float64).to(dtype) if e is not None else None for e in expected
    ]
    *found, _ = ops.layer_backward(cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
    wanted = gradients_by_reference(cell, exact, [None if g is None else g.double() for g in gradients])
    pairs = list(zip((output, hn, cn), expected, strict=True)) + list(zip(found, wanted, strict=True))
    bound = torch.finfo(dtype).eps * terms
    for ours, theirs in pairs:
        if theirs is None:
            assert ours is None or ours.numel() == 0
            continue
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=bound, atol=bound)
    inference = ops.layer_forward(cell, *arguments, False)
    assert all(torch.equal(a, b) for a, b in zip(inference[:3], (output, hn, cn), strict=True))
    assert inference[3].numel() == 0


# Rows around the fused kernel's tiles of 1, 4 and 8; hidden sizes around its 4 warps and around vectors of 2, 4 and 8.
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 3, 5),
    (3, 4, 8, 8),
    (2, 5, 7, 12),
    (3, 8, 16, 16),
    (2, 9, 5, 65),
    (17, 2, 3, 7),
]
SHAPES += [(2, 19, 40, 129)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, B, I, H", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_reference(
    cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, strategy: str
) -> None:
    arguments = make_layer(cell, T, B, I, H, directions=2, packed=B > 1, dtype=dtype)
    with forced(strategy):
        agree(cell, arguments, dtype, terms=20 * (T + B))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "directions, packed, states, bias",
    list(itertools.product((1, 2), (False, True), (False, True), (False, True))),
)
@pytest.mark.parametrize("cell", CELLS)
def test_every_form(
    cell: str, directions: int, packed: bool, states: bool, bias: bool, strategy: str
) -> None:
    for proj in (0, 3) if cell == "lstm" else (0,):
        arguments = make_layer(
            cell, 5, 4, 6, 8, directions=directions, packed=packed, states=states, bias=bias, proj=proj
        )
        with forced(strategy):
            agree(cell, arguments, torch.float64, terms=1000)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("B", [1, 3, 8, 13])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, B: int, strategy: str) -> None:
    for I, H, dtype in ((5, 9, torch.float64), (16, 32, torch.float32), (8, 24, torch.bfloat16)):
        input, _, h0, c0, *weights = make_layer(cell, 1, B, I, H, dtype=dtype)
        for states in ([h0[0], None if c0 is None else c0[0]], [None, None]):
            with forced(strategy):
                h, c, _ = ops.cell_forward(cell, input[0], *states, *weights[:4], False)
            exact = [None if t is None else t.double() for t in (input[0], *states, *weights[:4])]
            expected = reference.cell_step(cell, *exact)
            bound = 60 * torch.finfo(dtype).eps
            torch.testing.assert_close(h.double(), expected[0], rtol=bound, atol=bound)
            if cell == "lstm":
                torch.testing.assert_close(c.double(), expected[1], rtol=bound, atol=bound)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cell", CELLS)
def test_unaligned_memory_takes_the_scalar_kernels(cell: str, strategy: str) -> None:
    """A vector access beside its alignment is an error of the emulation, as on a GPU."""
    arguments = make_layer(cell, 2, 3, 8, 8, dtype=torch.float32)

    def shifted(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        room = tensor.new_empty(tensor.numel() + 1)
        return room[1:].view(tensor.shape).copy_(tensor)

    operators = emulated.load().operators
    with forced(strategy):
        expected = operators.layer_forward(cell, *arguments, False)
        found = operators.layer_forward(cell, *map(shifted, arguments), False)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_input_in_chunks() -> None:
    """A sequence whose input side does not fit the buffer: the second chunk begins in the middle."""
    T, B, H = 14, 32, 4096
    steps = int(_C.plan(cell="rnn_relu", dtype="fp64", T=T, B=B, I=2, H=H, directions=2)["input"].split()[3])
    assert 0 < steps < T and T % steps
    arguments = make_layer("rnn_relu", T, B, 2, H, directions=2, states=False)
    emulated.load().runtime.frnn_emulation_set_yield_probability(0.0)
    output, hn, _, _ = ops.layer_forward("rnn_relu", *arguments, False)
    expected = reference.layer("rnn_relu", *arguments)
    torch.testing.assert_close((output, hn), expected[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_reset_mask(cell: str, packed: bool, strategy: str) -> None:
    arguments = make_layer(cell, 6, 5, 4, 8, directions=2, packed=packed)
    with forced(strategy):
        assert_reset(cell, arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cell", CELLS)
def test_no_schedule_changes_a_bit(cell: str, strategy: str) -> None:
    runtime = emulated.load().runtime
    arguments = make_layer(cell, 3, 5, 6, 10, directions=2, packed=True, dtype=torch.float32)
    results, schedules = [], set()
    for seed in range(4):
        runtime.frnn_emulation_set_seed(seed)
        with forced(strategy):
            results.append(ops.layer_forward(cell, *arguments, True))
        schedules.add(runtime.frnn_emulation_schedule())
    assert len(schedules) == 4
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_wrong_calls_are_refused_before_a_kernel_runs() -> None:
    arguments = make_layer("lstm", 3, 2, 4, 6, dtype=torch.float32)
    arguments[3] = arguments[3][:, :1]
    with pytest.raises(RuntimeError, match=r"fused_rnn: expected c0 of size \[1, 2, 6\]"):
        ops.layer_forward("lstm", *arguments, False)


# ------------------------------------------------------------------------------------------------------- plans


def plan(**changes) -> dict:
    problem = {"cell": "lstm", "dtype": "fp32", "T": 100, "B": 16, "I": 64, "H": 256}
    return _C.plan(**{**problem, **changes})


def test_few_rows_are_one_launch_a_step() -> None:
    """In float64, for which there are no other kernels."""

    def of(**sizes: int) -> dict:
        return plan(dtype="fp64", **sizes)

    assert [of(B=B)["strategy"] for B in (1, 8, 9, 300)] == ["step_fused", "step_fused", "step", "step"]
    assert of(B=8)["launches_per_step"] == 1
    assert "kernel" in of(B=8, T=1)["input"] and "kernel" not in of(B=8, T=2)["input"]
    assert of(B=1, P=32)["strategy"] == "step"


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp64", "fp16", "bf16"])
def test_the_input_side_has_a_bounded_buffer(dtype: str) -> None:
    for B, H, T, directions in (
        (16, 256, 100, 1),
        (512, 2048, 1000, 2),
        (70000, 4096, 5, 1),
        (1, 1, 10**6, 1),
    ):
        steps = int(plan(B=B, H=H, T=T, directions=directions, dtype=dtype)["input"].split()[3])
        assert 1 <= steps <= T
        size = steps * B * directions * 4 * H * (8 if dtype == "fp64" else 4)
        assert steps == 1 or size <= 24 << 20
        assert steps == T or size * (steps + 1) > (24 << 20) * steps


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"T": 0}, "positive sizes"),
        ({"directions": 3}, "positive sizes"),
        ({"cell": "qrnn"}, "unknown cell 'qrnn': expected rnn_tanh, rnn_relu, gru, lstm"),
        ({"dtype": "int8"}, "unknown dtype 'int8': expected fp32"),
        ({"arch": "sm_70"}, "unknown architecture 'sm_70'"),
        ({"arch": "hopper"}, "unknown architecture 'hopper'"),
    ],
)
def test_plan_refuses_nonsense(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**wrong)


def test_force_plan_nests_and_is_undone() -> None:
    assert plan(dtype="fp64")["strategy"] == "step" and _C.forced_plan() is None
    with fused_rnn.force_plan("step_fused"):
        assert plan()["strategy"] == "step_fused" and plan()["why"] == "asked for"
        assert plan(P=8)["strategy"] == "step"  # where it can run
        with fused_rnn.force_plan("step"):
            assert plan(B=1)["strategy"] == "step"
        with pytest.raises(ZeroDivisionError), fused_rnn.force_plan("step"):
            raise ZeroDivisionError
        assert _C.forced_plan() == "step_fused"
    assert _C.forced_plan() is None
    with (
        pytest.raises(ValueError, match="unknown strategy 'cudnn': expected step_fused, step"),
        fused_rnn.force_plan("cudnn"),
    ):
        pass
