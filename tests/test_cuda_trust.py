"""The first use of a persistent CUDA kernel is checked (csrc/ops/cuda/trust.h), and no wait hangs: on emulated
kernels, on an emulated GPU that a test breaks. The twins on a real one are in test_cuda_persistent_gpu.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import a_gpu, forced
from test_ops import make_layer, wanted_bits
from torch import Tensor

from fused_rnn import _C, ops

Values = list[Tensor | None]


class Case(NamedTuple):
    """A layer for which the planner chooses this strategy in both passes. It multiplies and launches once, step
    kernels launch T times, and a check more often than that. In float32, which it rounds to TF32, as steps do not."""

    strategy: str
    arch: int
    multiprocessors: int  # that the planner knows of: a grid of few blocks
    cell: str
    dtype: torch.dtype
    H: int
    T: int = 7
    B: int = 3

    def arguments(self) -> Values:
        return make_layer(self.cell, self.T, self.B, 4, self.H, dtype=self.dtype)

    def gpu(self) -> contextlib.AbstractContextManager[None]:
        return a_gpu(arch=self.arch, planned=self.multiprocessors)


CASES = (
    Case("block", 90, 132, "lstm", torch.float32, 20),
    Case("cluster", 90, 132, "gru", torch.float32, 70),
    Case("grid", 80, 2, "rnn_tanh", torch.float32, 70),
)
STEPS = "step_fused"  # with few rows; backward they are "step"
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.strategy)
BLOCK = CASES[0]


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    with emulated.unfair_schedules(), emulated.in_place_of_the_cpu(), a_gpu():
        yield
    torch.backends.cudnn.rnn.fp32_precision = before


class Work(NamedTuple):
    products: int
    launches: int


def work(call) -> tuple[Values, Work]:
    runtime = emulated.load().runtime
    before = runtime.frnn_emulation_products(), runtime.frnn_emulation_launches()
    found = call()
    return found, Work(
        runtime.frnn_emulation_products() - before[0], runtime.frnn_emulation_launches() - before[1]
    )


def forward(case: Case, arguments: Values) -> tuple[Values, Work]:
    return work(lambda: list(ops.layer_forward(case.cell, *arguments, True)))


def backward(case: Case, arguments: Values, results: Values) -> tuple[Values, Work]:
    """Of the sum of the output. Beside the scan it multiplies, but launches nothing that is counted."""
    output, _, _, saved = results
    call = (case.cell, torch.ones_like(output), None, None, *arguments, output, saved)
    return work(lambda: list(ops.layer_backward(*call, wanted_bits(arguments))))


def same(found: Values, expected: Values) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def warnings(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "fused_rnn: on its first use" in line]


@cases
def test_the_cases_are_what_the_planner_chooses(case: Case) -> None:
    sizes = {"T": case.T, "B": case.B, "I": 4, "H": case.H, "multiprocessors": case.multiprocessors}
    plan = _C.plan(cell=case.cell, dtype="tf32", **sizes, training=True, arch=f"sm_{case.arch}")
    assert (plan["strategy"], plan["backward_strategy"]) == (case.strategy, case.strategy)


@cases
def test_a_kernel_that_agrees_is_what_runs(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Checked once: the second call is the launch alone. And it is the kernel that force_plan gives, bit for bit."""
    arguments = case.arguments()
    with case.gpu():
        found, checked = forward(case, arguments)
        again, once = forward(case, arguments)
        gradients, first = backward(case, arguments, again)
        repeated, second = backward(case, arguments, again)
        with forced(case.strategy):
            expected, _ = forward(case, arguments)
            wanted, _ = backward(case, arguments, again)
    assert not warnings(capfd)
    assert once == Work(1, 1) and checked.launches > case.T
    assert second.launches == 1 and first.launches > case.T
    assert same(found, again) and same(gradients, repeated)
    assert same(again, expected) and same(gradients, wanted)


@pytest.mark.parametrize(
    "case, fault",
    [*((case, "products") for case in CASES), *((case, "messages") for case in CASES[1:])],
    ids=lambda value: value if isinstance(value, str) else value.strategy,
)
def test_a_kernel_that_fails_its_check_is_not_used(
    case: Case, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A message that is lost makes some block wait in vain, which ends."""
    arguments = case.arguments()
    with case.gpu():
        with forced(STEPS):
            expected, _ = forward(case, arguments)
            wanted, _ = backward(case, arguments, expected)
        with emulated.broken(**{fault: True}):
            found, _ = forward(case, arguments)
            gradients, _ = backward(case, arguments, expected)
            said = warnings(capfd)
            again, work_again = forward(case, arguments)
            repeated, _ = backward(case, arguments, expected)
    assert not warnings(capfd) and work_again.launches == case.T
    assert len(said) == 2
    for text, name in zip(said, ("forward", "backward"), strict=True):
        assert f"{case.cell} {name} by strategy {case.strategy}" in text
        assert "emulated" in text and f"H {case.H}" in text and "report" in text
        assert ("waited in vain" if fault == "messages" else "differs in") in text
    assert same(found, expected) and same(again, expected)
    assert same(gradients, wanted) and same(repeated, wanted)


@cases
def test_a_kernel_that_was_not_compiled_is_not_used(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Asked for or not: of PTX for an older GPU the driver makes no kernel that only newer ones have."""
    arguments = case.arguments()
    with case.gpu(), emulated.kernels_of_an_older_gpu():
        with forced(STEPS):
            expected, _ = forward(case, arguments)
            wanted, _ = backward(case, arguments, expected)
        for strategy in ("", case.strategy):
            with forced(strategy) if strategy else contextlib.nullcontext():
                found, done = forward(case, arguments)
                gradients, _ = backward(case, arguments, expected)
            assert done.launches == case.T
            assert strategy or (same(found, expected) and same(gradients, wanted))
    assert not warnings(capfd)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.strategy)
def test_a_wait_in_vain_outside_a_check_traps(case: Case) -> None:
    arguments = case.arguments()
    with (
        case.gpu(),
        emulated.broken(messages=True),
        forced(case.strategy),
        pytest.raises(RuntimeError) as trap,
    ):
        forward(case, arguments)
    assert "__trap()" in str(trap.value)


@pytest.mark.parametrize(
    "case, checked",
    [(CASES[1], False), (CASES[2], False), (CASES[2], True)],
    ids=lambda value: f"checked={value}" if isinstance(value, bool) else value.strategy,
)
def test_patience(case: Case, checked: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """In turns of 2^32 cycles. Blocks of a grid may have to wait for multiprocessors that a kernel has which waits for
    another machine: a first message has minutes. A check does without it, and a cluster begins as a whole."""
    arguments, runtime = case.arguments(), emulated.load().runtime
    runtime.frnn_emulation_set_turns_in_vain(64)
    try:
        with case.gpu(), emulated.broken(messages=True):
            runtime.frnn_emulation_longest_wait()
            if checked:
                forward(case, arguments)
                assert "waited in vain" in warnings(capfd)[0]
            else:
                with forced(case.strategy), pytest.raises(RuntimeError, match="__trap"):
                    forward(case, arguments)
            turns = runtime.frnn_emulation_longest_wait()
    finally:
        runtime.frnn_emulation_set_turns_in_vain(1000)
    patient = case.strategy == "grid" and not checked
    assert (512 <= turns < 1000) if patient else (0 < turns < 400), turns


def test_what_is_asked_for_runs_unchecked(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = BLOCK.arguments()
    with forced(STEPS):
        steps, _ = forward(BLOCK, arguments)
    with emulated.broken(products=True), forced("block"):
        wrong, only = forward(BLOCK, arguments)
    assert only == Work(1, 1) and not warnings(capfd)
    assert (wrong[0] - steps[0]).abs().max() > 0.1
    assert forward(BLOCK, arguments)[1].launches > BLOCK.T, "it has not been checked yet"


def test_nothing_is_checked_while_a_graph_is_captured() -> None:
    """Steps are captured, and nothing is remembered: the first call afterwards checks. What has been checked before is
    captured."""
    arguments = BLOCK.arguments()
    with forced(STEPS):
        steps, _ = forward(BLOCK, arguments)
    with emulated.capturing():
        captured, during = forward(BLOCK, arguments)
    assert during.launches == BLOCK.T and same(captured, steps)
    found, checked = forward(BLOCK, arguments)
    assert checked.launches > BLOCK.T and not same(found, steps)
    with emulated.capturing():
        captured, during = forward(BLOCK, arguments)
    assert during == Work(1, 1) and same(captured, found)


def test_a_kernel_may_be_met_first_while_a_graph_is_captured() -> None:
    arguments = BLOCK.arguments()
    with emulated.capturing(), forced("block"):
        captured, during = forward(BLOCK, arguments)
    with forced("block"):
        assert during == Work(1, 1) and same(captured, forward(BLOCK, arguments)[0])


def test_each_kernel_is_checked_for_itself() -> None:
    """Another hidden size or dtype is another kernel, or other waits; other lengths and rows of a tile are not."""
    cases = [
        BLOCK,
        BLOCK._replace(T=20, B=7),
        BLOCK._replace(H=21),
        BLOCK._replace(dtype=torch.bfloat16),
        BLOCK,
    ]
    checked = [forward(case, case.arguments())[1].launches > 1 for case in cases]
    assert checked == [True, False, True, True, False]


def test_a_check_leaves_no_trace() -> None:
    """Neither in torch's generator nor in autograd's graph, whatever mode the caller is in."""
    arguments = BLOCK.arguments()
    arguments[0].requires_grad_()
    state = torch.get_rng_state()
    for mode in (torch.inference_mode, torch.enable_grad):
        with a_gpu(), mode():
            found, checked = forward(BLOCK, [None if a is None else a.detach() for a in arguments])
        assert checked.launches > BLOCK.T
        assert all(not value.requires_grad for value in found)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fault", [False, True])
def test_threads_that_ask_at_once(fault: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Each finds the same, and the warning is given once."""
    arguments = BLOCK.arguments()
    with forced(STEPS):
        steps, _ = forward(BLOCK, arguments)
    results, start = [], threading.Barrier(3)

    def call() -> None:
        start.wait()
        results.append(list(ops.layer_forward(BLOCK.cell, *arguments, True)))

    threads = [threading.Thread(target=call) for _ in range(3)]
    with emulated.broken(products=fault):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(results) == 3 and len(warnings(capfd)) == fault
    assert all(same(found, results[0]) for found in results)
    assert same(results[0], steps) == fault
