"""The benchmark's tolerance law: what it lets through, what it stops, and that its reference is right."""

from __future__ import annotations

import pytest
import torch
from fused_rnn_bench.case import CELLS, LAYERS, Case
from fused_rnn_bench.parity import Judge, torch_outputs
from fused_rnn_bench.peers.modules import FusedRnn, TorchNN
from fused_rnn_bench.problem import make_problem


def variants(mode: str, dtype: str = "fp32") -> list[Case]:
    """Every cell, and every layer stacked, in both directions, dense and packed."""
    plain = [Case(cell, mode, dtype, "cpu", 3, 5, 6, 8) for cell in CELLS]
    stacks = [Case(cell, mode, dtype, "cpu", 9, 5, 6, 8, 2, True, lengths) for cell in LAYERS
              for lengths in ("dense", "equal", "varied")]  # fmt: skip
    return plain + stacks


@pytest.mark.parametrize("contender", [TorchNN, FusedRnn])
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_every_kind_of_case_passes(contender, mode, dtype):
    for case in variants(mode, dtype):
        problem = make_problem(case)
        judge = Judge(problem, TorchNN("cpu", 1).prepare(problem).outputs())
        verdict = judge.judge(contender("cpu", 1).prepare(problem).outputs())
        assert verdict.ok, f"{case.key}: {verdict}"


def test_float64_is_held_to_the_rounding_of_float64():
    problem = make_problem(Case("gru", "train", "fp64", "cpu", 9, 5, 6, 8))
    outputs = TorchNN("cpu", 1).prepare(problem).outputs()
    judge = Judge(problem, outputs)
    assert judge.judge(outputs).error == 0
    for name, value in outputs.items():
        step = value.abs().max() * torch.finfo(torch.float64).eps
        assert judge.judge(outputs | {name: value + step}).ok
        assert not judge.judge(outputs | {name: value + 1000 * step}).ok, name


def test_training_names_every_gradient():
    names = set(
        torch_outputs(make_problem(Case("lstm_cell", "train", "fp32", "cpu", 2, 3, 4, 5)), torch.float32)
    )
    weights = {f"grad {name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert names == {"h_n", "c_n", "grad input", "grad h_0", "grad c_0"} | weights


def test_a_case_has_the_same_numbers_every_time_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (make_problem(Case("gru", "train", "fp32", "cpu", 4, 3, 5, 6)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.x, second.x) and torch.equal(first.cotangent, second.cotangent)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.fixture
def judged():
    """A judge of one LSTM case, torch.nn's own outputs for it, and the reference; then those two for the further
    draws that a case so small has."""
    case = Case("lstm", "train", "fp32", "cpu", 6, 3, 4, 5)
    first, *others = (make_problem(case, draw) for draw in range(4))
    outputs = TorchNN("cpu", 1).prepare(first).outputs()
    more = [[torch_outputs(p, dtype) for dtype in (torch.float32, torch.float64)] for p in others]
    return Judge(first, outputs), outputs, torch_outputs(first, torch.float64), more


@pytest.mark.parametrize(
    "name", ["output", "h_n", "c_n", "grad input", "grad weight_hh_l0", "grad bias_ih_l0"]
)
def test_one_wrong_number_anywhere_is_found(judged, name):
    judge, outputs, reference, more = judged
    torchs_error = max((own[name] - exact[name]).abs().max() for own, exact in [(outputs, reference), *more])
    allowed = 2 * torchs_error + torch.finfo(torch.float32).eps * reference[name].abs().max()
    wrong = reference[name].clone()
    wrong.view(-1)[-1] += 1.01 * allowed
    verdict = judge.judge(outputs | {name: wrong})
    assert not verdict.ok and verdict.tensor == name and f"{name}: error" in str(verdict)
    wrong.view(-1)[-1] -= 0.02 * allowed
    assert judge.judge(outputs | {name: wrong}).ok


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value * float("nan"), "output is not finite"),
        (lambda value: value / 0, "output is not finite"),
        (lambda value: value[:-1], r"output has shape \[5, 3, 5\], expected \[6, 3, 5\]"),
    ],
)
def test_what_cannot_be_compared_is_no_pass(judged, spoil, message):
    judge, outputs, *_ = judged
    verdict = judge.judge(outputs | {"output": spoil(outputs["output"])})
    assert not verdict.ok and verdict.to_json()["ok"] is False and verdict.to_json()["error"] is None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(verdict))


def test_only_a_peer_may_leave_outputs_out(judged):
    judge, outputs, *_ = judged
    some = {"output": outputs["output"]}
    assert judge.judge(some, must_have_all=False).ok
    assert str(judge.judge(some)) == "h_n is missing"
    assert not judge.judge({}, must_have_all=False).ok


@pytest.mark.parametrize("contender", [TorchNN, FusedRnn])
def test_memory_of_a_training_step_grows_with_time(contender):
    def saved(T: int) -> int:
        case = Case("gru", "train", "fp32", "cpu", T, 8, 16, 16)
        return contender("cpu", 1).prepare(make_problem(case)).memory()["bytes"]

    # At least the hidden state of every step is needed for backward, at most a few gates' worth.
    one_step = 8 * 16 * 4
    assert one_step * 20 <= saved(40) - saved(20) <= one_step * 20 * 12
    infer = make_problem(Case("gru", "infer", "fp32", "cpu", 4, 8, 16, 16))
    assert contender("cpu", 1).prepare(infer).memory() is None


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 128), (50, 1, 128), (10, 10, 64), (25, 8, 64), (40, 16, 64)], ids=str
)
def test_peak_memory_is_not_above_torchs(cell: str, shape: tuple[int, int, int]):
    """And the same in every run, and at least what forward keeps. Rows and units in the proportions of the core suite:
    25x64x1024, 50x32x512 and 50x32x128 are 10x10x64, 25x8x64 and 40x16x64 but for their size."""
    T, B, H = shape
    problem = make_problem(Case(cell, "train", "fp32", "cpu", T, B, H, H))
    measured = []
    for contender in (FusedRnn, TorchNN):
        runnable = contender("cpu", 1).prepare(problem)
        runnable.outputs()
        first, second = runnable.memory(), runnable.memory()
        assert first == second
        assert first["peak_bytes"] >= first["bytes"]
        measured.append(first["peak_bytes"])
    ours, theirs = measured
    assert ours <= theirs
