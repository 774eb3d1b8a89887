"""The CPU kernels below the operators: instruction sets, threads, floating-point state, plans."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from test_ops import CELLS, gradients_by_reference, make_layer, wanted_bits
from torch import Tensor

from fused_rnn import _C, ops, reference


def run(cell: str, arguments: list[Tensor | None]) -> list[Tensor]:
    """Results and gradients of one call, gradients of all results being one."""
    output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
    ones = [torch.ones_like(output), torch.ones_like(hn), torch.ones_like(cn) if cell == "lstm" else None]
    found = ops.layer_backward(cell, *ones, *arguments, output, saved, wanted_bits(arguments))
    return [output, hn, cn, *(g for g in found if g is not None)]


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [1, 5, 16, 31, 67, 150])
def test_every_instruction_set_agrees_with_reference(cell: str, H: int, dtype: torch.dtype, isa: str) -> None:
    _C.set_isa(isa)
    assert _C.isa() == isa
    for B in (1, 6, 23):  # one row; one tile; several tiles with a remainder
        arguments = make_layer(cell, 4, B, 3, H, directions=2, packed=True, dtype=dtype)
        exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
        for ours, theirs in zip(
            ops.layer_forward(cell, *arguments, False)[:2], reference.layer(cell, *exact), strict=False
        ):
            # Sums of H + 3 products of order 1, each rounded; relu states of a few steps grow to some tens.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), theirs, rtol=100 * eps, atol=20 * (H + 3) ** 0.5 * eps)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [1, 31, 66, 127, 200])
def test_one_step_agrees_with_reference(cell: str, H: int, dtype: torch.dtype, isa: str) -> None:
    """Weights that are multiplied where they lie: by a few rows, tiles of every height; by many, side by side in one
    vector, two, or tiles of two that are filled in part; units and numbers that fill no vector."""
    _C.set_isa(isa)
    for B in (2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 70):
        arguments = make_layer(cell, 1, B, H + 3, H, directions=1 + B % 2, dtype=dtype)
        exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
        ours, theirs = ops.layer_forward(cell, *arguments, False)[0], reference.layer(cell, *exact)[0]
        # Sums of 2 H + 3 products of order 1, each rounded.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=8 * eps, atol=1.4 * (2 * H + 3) ** 0.5 * eps)


MULTIPLY_BFLOAT16 = [isa for isa in _C.isas() if isa in ("amx", "avx512_bf16")]


@pytest.mark.parametrize("isa", _C.isas()[: max(2, len(MULTIPLY_BFLOAT16) + 1)])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("proj", [0, 5])
@pytest.mark.parametrize("H", [1, 5, 16, 31, 67])
def test_bfloat16_of_odd_sizes_agrees_with_reference(cell: str, H: int, proj: int, isa: str) -> None:
    """Sets that multiply bfloat16 and the next best: pairs of k with one left over, few rows (weights as they lie) and
    many, units that fill no vector, the input multiplied before the scan (B = 6) and inside it."""
    _C.set_isa(isa)
    if proj and (cell != "lstm" or proj >= H):
        proj = 0
    for T, B, I in ((1, 3, 7), (1, 7, 35), (4, 6, 35), (3, 23, 3), (3, 23, 64)):
        arguments = make_layer(cell, T, B, I, H, directions=2, packed=T > 1, proj=proj, dtype=torch.bfloat16)
        exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
        torch.set_num_threads(3 if B == 23 else 1)
        output, hn, _, saved = ops.layer_forward(cell, *arguments, True)
        # A few roundings of bfloat16, 2^-9 each, of states about 1, or of some tens with relu.
        for ours, theirs in zip((output, hn), reference.layer(cell, *exact), strict=False):
            torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.03)
        gradients = [torch.ones_like(output), torch.ones_like(hn), None]
        *found, _ = ops.layer_backward(cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
        wide = [g.double() if g is not None else g for g in gradients]
        wanted = gradients_by_reference(cell, exact, wide)
        for ours, theirs in zip(found, wanted, strict=True):
            if theirs is not None and cell != "rnn_relu":  # its derivative jumps where a rounding may fall
                scale = theirs.abs().max().item() if theirs.numel() else 0.0
                torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.03 * scale + 0.02)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_takes_no_number_from_beyond_an_odd_row(cell: str) -> None:
    """NaN after the last number of x, h0 and each weight's row must not be multiplied, not even by zero."""
    T, B, I, H = 2, 20, 3, 5
    arguments = make_layer(cell, T, B, I, H, dtype=torch.bfloat16)
    wanted = ops.layer_forward(cell, *arguments, False)[0]

    def amid_nan(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        memory = torch.full((tensor.numel() + 2,), float("nan"), dtype=tensor.dtype)
        memory[1:-1] = tensor.flatten()
        return memory[1:-1].view(tensor.shape)

    found = ops.layer_forward(cell, *map(amid_nan, arguments), False)[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("B", [2, 20])
def test_nan_and_inf_in_bfloat16(cell: str, value: float, B: int) -> None:
    arguments = make_layer(cell, 4, B, 5, 20, dtype=torch.bfloat16)
    arguments[0][1, 1, 2] = value
    ours = ops.layer_forward(cell, *arguments, False)[0].double()
    theirs = reference.layer(cell, *(a if a is None else a.double() for a in arguments))[0]
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize(
    "T, B, I, H",
    [(9, 70, 1, 5), (9, 70, 3, 40), (5, 1, 70, 3), (3, 200, 33, 17), (2, 131, 600, 9), (1, 7, 9, 530)],
)
def test_gradients_over_many_rows(T: int, B: int, I: int, H: int, isa: str, threads: int) -> None:
    """The products around the scan: several blocks of rows, columns and units, few of each, and their remainders."""
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    arguments = make_layer("gru", T, B, I, H, directions=2)  # its n gate takes part in two products
    output, hn, _, saved = ops.layer_forward("gru", *arguments, True)
    gradients = [torch.randn_like(output), torch.randn_like(hn), None]
    *found, _ = ops.layer_backward("gru", *gradients, *arguments, output, saved, wanted_bits(arguments))
    wanted = gradients_by_reference("gru", arguments, gradients)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("T, B, H", [(3, 1, 40), (6, 2, 200), (5, 64, 48), (4, 40, 300)])
def test_repeats_are_bit_identical(cell: str, T: int, B: int, H: int) -> None:
    arguments = make_layer(cell, T, B, 7, H, directions=2, dtype=torch.float32)
    torch.set_num_threads(2)
    first = run(cell, arguments)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(cell, arguments), first, strict=True))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "T, B, H, proj", [(9, 1, 300, 0), (9, 3, 300, 40), (7, 90, 40, 0), (7, 90, 40, 9), (6, 30, 170, 0)]
)
@pytest.mark.parametrize("directions", [1, 2])
def test_threads_change_no_result(cell: str, T: int, B: int, H: int, proj: int, directions: int) -> None:
    """The scan gives the same bits however it is spread; only the matrix products around it may differ."""
    proj = proj if cell == "lstm" else 0
    arguments = make_layer(
        cell, T, B, 8, H, directions=directions, proj=proj, packed=True, dtype=torch.float32
    )
    torch.set_num_threads(1)
    alone = run(cell, arguments)
    torch.set_num_threads(4)  # more than the machine may have: the barrier must live with that
    together = run(cell, arguments)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_python_threads_may_call_at_once() -> None:
    arguments = make_layer("lstm", 20, 4, 16, 96, dtype=torch.float32)
    expected = ops.layer_forward("lstm", *arguments, False)[0]
    failures: list[str] = []

    def work() -> None:
        for _ in range(10):
            if not torch.equal(ops.layer_forward("lstm", *arguments, False)[0], expected):
                failures.append("another result")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers), "a call hangs"
    assert not failures


def test_works_in_a_forked_child() -> None:
    """As in a DataLoader worker: the parent has used its threads, the child computes on one."""
    code = """
import os, torch, fused_rnn
layer = fused_rnn.LSTM(64, 128)
x = torch.randn(30, 16, 64)
torch.set_num_threads(2)
expected = layer(x)[0].detach()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.allclose(layer(x)[0], expected, atol=1e-5) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_denormals_are_flushed_inside_and_the_caller_keeps_its_setting() -> None:
    tiny = torch.tensor([1e-40])
    weights = [torch.zeros(1, 1), torch.zeros(1, 1), None, None, None] + [None] * 5
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            kept = (tiny * 1).item() != 0
            ops.layer_forward("rnn_relu", tiny.view(1, 1, 1), None, None, None, *weights, False)
            assert ((tiny * 1).item() != 0) == kept
        finally:
            torch.set_flush_denormal(False)
    state = tiny.view(1, 1, 1)
    weights[1] = torch.ones(1, 1)
    output = ops.layer_forward("rnn_relu", torch.zeros(1, 1, 1), None, state, None, *weights, False)[0]
    assert output.item() == 0


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_output_as_in_reference(cell: str, value: float) -> None:
    arguments = make_layer(cell, 4, 3, 5, 20, dtype=torch.float32)
    arguments[0][1, 1, 2] = value
    ours, theirs = ops.layer_forward(cell, *arguments, False)[0], reference.layer(cell, *arguments)[0]
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_past_a_nan_are_those_of_reference(cell: str, isa: str) -> None:
    """Among them the slope of relu at NaN, which torch takes to be one."""
    _C.set_isa(isa)
    arguments = make_layer(cell, 4, 3, 5, 20)
    arguments[0][1, 1, 2] = float("nan")
    output, _, _, saved = ops.layer_forward(cell, *arguments, True)
    gradients = [torch.ones_like(output), None, None]
    found = ops.layer_backward(cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
    for ours, theirs in zip(found, gradients_by_reference(cell, arguments, gradients), strict=False):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def plan(cell: str = "lstm", **sizes: int | str) -> dict:
    return _C.cpu_plan(cell, **{"T": 50, "B": 32, "I": 256, "H": 256, "threads": 2, **sizes})


def test_plan_spreads_what_is_worth_it() -> None:
    assert plan(T=1, B=1, I=1, H=1)["strategy"] == plan(T=12, B=1)["strategy"] == "direct"
    assert plan()["strategy"] == plan(T=12, B=1, H=8)["strategy"] == "packed"
    assert plan(T=2, B=1, I=4, H=4)["threads"] == 1
    assert plan(threads=1)["threads"] == 1
    assert plan(H=1024)["unit_groups"] == 2
    assert plan(directions=2)["direction_groups"] == 2
    assert plan(H=16, B=512)["row_groups"] == 2


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_the_rows_of_a_ragged_batch(cell: str, isa: str) -> None:
    """Weights that fit every core's L2: each thread takes some of the longer sequences and some of the shorter ones."""
    _C.set_isa(isa)
    torch.set_num_threads(2)
    T, I, H = 30, 5, 33
    for B in (16, 19, 41):
        assert plan(cell, T=T, B=B, I=I, H=H, dtype="fp64")["row_groups"] == 2
        arguments = make_layer(cell, T, B, I, H, packed=True)
        output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
        expected = reference.layer(cell, *arguments)
        torch.testing.assert_close([output, hn], list(expected[:2]), rtol=1e-11, atol=1e-11)
        gradients = [
            torch.randn_like(output),
            torch.randn_like(hn),
            torch.randn_like(cn) if cell == "lstm" else None,
        ]
        *found, _ = ops.layer_backward(cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
        wanted = gradients_by_reference(cell, arguments, gradients)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("directions", [1, 2])
def test_plan_never_takes_more_threads_than_there_are(threads: int, directions: int) -> None:
    for cell in CELLS:
        for H in (1, 17, 300, 2048):
            for B in (1, 7, 256):
                found = plan(cell, H=H, B=B, threads=threads, directions=directions)
                groups = found["direction_groups"] * found["unit_groups"] * found["row_groups"]
                assert 1 <= groups == found["threads"] <= threads
                assert found["why"]


@pytest.mark.parametrize("isa", _C.isas())
def test_plan_says_what_is_multiplied(isa: str) -> None:
    _C.set_isa(isa)
    pairs = isa in MULTIPLY_BFLOAT16
    assert plan(dtype="bf16")["products"].startswith("of bfloat16") == pairs
    scan = plan(dtype="bf16", training=True)["products"]
    assert ("bfloat16 around" in scan) == (isa == "avx512_bf16")
    assert scan.startswith("of bfloat16") == (isa == "amx")
    assert ("sums of bfloat16" in plan(training=True)["products"]) == (isa == "amx")
    assert plan(dtype="fp16", B=4)["products"] == "of float32: operands are widened"
    cases: list[tuple[dict[str, int], bool]] = [
        ({"H": 128}, True),
        ({"H": 127}, False),
        ({"T": 3}, False),
        ({"T": 64, "B": 15}, True),  # of the input alone
        ({"T": 64, "B": 15, "H": 255}, False),
        ({"T": 500, "B": 1}, False),
    ]
    for sizes, splits in cases:
        found = plan(**sizes)["products"]
        assert found == "of float32" + (", as sums of bfloat16" if splits and isa == "amx" else "")
    assert plan(dtype="fp64")["vector"] * 2 == plan(dtype="fp32")["vector"] == plan(dtype="bf16")["vector"]


def test_plan_refuses_nonsense() -> None:
    for wrong in ({"T": 0}, {"threads": 0}, {"directions": 3}, {"P": -1}):
        with pytest.raises(ValueError, match="cpu_plan"):
            plan(**wrong)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        plan(dtype="int8")
    with pytest.raises(ValueError, match="unknown cell"):
        plan("qrnn")


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown instruction set 'avx9000'"):
        _C.set_isa("avx9000")
