"""Measures one case: every contender is prepared, held to the tolerance law, then timed in turns."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence

from .case import Case
from .parity import Judge
from .peers.base import Contender, Runnable
from .peers.modules import TorchNN
from .precision import precision
from .problem import Outputs, Problem, make_problem
from .results import Entry, Record
from .timing import Effort

# A peer may exceed the allowed error this many times and still be timed, marked as loose. Beyond that it is
# wired wrong or computes in another precision than the case says.
_LOOSE = 10

# How long threads of another process may spin on after their last call.
_SETTLE_SECONDS = 0.03

# Samples in a row before the turn goes to a contender in another process.
_BURST = 5


class LeaveOut(Exception):
    """The case cannot be measured by anyone; its text says why."""


class Measurement:
    """One case on its way through preparation, parity and timing.

    The first contender is fused_rnn, the others are its peers. Whoever raises an error at any point is out,
    and the error is its result; only where torch.nn itself fails is there nothing to measure against.
    """

    def __init__(self, case: Case, contenders: Sequence[Contender], effort: Effort) -> None:
        self._case = case
        self._contenders = contenders
        self._effort = effort
        self._entries = {contender.name: Entry("refused") for contender in contenders}
        self._runnables: dict[str, Runnable] = {}
        self._isolated = {contender.name for contender in contenders if contender.isolated}

    def run(self) -> Record:
        """Do it all. Raises LeaveOut when torch.nn cannot run the case."""
        with precision(self._case.dtype, self._case.device):
            problem = self._problem()
            self._prepare(problem)
            self._check(problem)
            self._make_ready()
            self._time()
        return Record(self._case, self._entries)

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """An error inside belongs to this contender and puts it out of the case."""
        try:
            yield
        except Exception as error:
            self._entries[name] = Entry("failed", first_line(error))
            self._runnables.pop(name, None)

    def _problem(self) -> Problem:
        try:
            return make_problem(self._case)
        except Exception as error:
            raise LeaveOut(f"cannot be set up: {first_line(error)}") from error

    def _prepare(self, problem: Problem) -> None:
        for contender in self._contenders:
            if reason := contender.refuses(self._case):
                self._entries[contender.name].reason = reason
                continue
            with self._blaming(contender.name):
                self._runnables[contender.name] = contender.prepare(problem)

    def _check(self, problem: Problem) -> None:
        """Hold every contender to the tolerance law; those that fail it are not timed."""
        outputs_of_torch: Outputs = {}
        if TorchNN.name in self._runnables:
            with self._blaming(TorchNN.name):
                outputs_of_torch = self._runnables[TorchNN.name].outputs()
                judge = Judge(problem, outputs_of_torch)
        if TorchNN.name not in self._runnables:
            raise LeaveOut(f"torch.nn cannot run it: {self._entries[TorchNN.name].reason}")
        for name in list(self._runnables):
            is_peer = name != self._contenders[0].name
            with self._blaming(name):
                outputs = outputs_of_torch if name == TorchNN.name else self._runnables[name].outputs()
                verdict = judge.judge(outputs, must_have_all=not is_peer)
                if verdict.ok:
                    self._entries[name] = Entry("ok", parity=verdict.to_json())
                elif is_peer and verdict.ratio <= _LOOSE:
                    self._entries[name] = Entry("loose", str(verdict), parity=verdict.to_json())
                else:
                    self._entries[name] = Entry("invalid", str(verdict), parity=verdict.to_json())
                    del self._runnables[name]

    def _make_ready(self) -> None:
        """Measure memory, and find how many calls make a sample."""
        for name, runnable in list(self._runnables.items()):
            time.sleep(_SETTLE_SECONDS if name in self._isolated else 0)
            with self._blaming(name):
                entry = self._entries[name]
                entry.memory = runnable.memory()
                entry.settings = runnable.settings()
                entry.calls_per_sample = runnable.calibrate(self._effort.sample_seconds)

    def _time(self) -> None:
        """Take samples in turns until everyone has enough, changing the order from round to round."""
        together = [name for name in self._runnables if name not in self._isolated]
        groups = [together] + [[name] for name in self._runnables if name in self._isolated]
        alone = len(groups) == 1
        turn = 0
        with _no_garbage_collection():
            while any(self._hungry(group) for group in groups):
                for group in groups:
                    if not alone:
                        self._settle(group)
                    for _ in range(1 if alone else _BURST):
                        for name in self._hungry(group)[:: -1 if turn % 2 else 1]:
                            self._sample(name)
                        turn += 1

    def _hungry(self, group: list[str]) -> list[str]:
        """Those of a group that are still in the case and want more samples."""
        present = [name for name in group if name in self._runnables]
        return [
            name
            for name in present
            if not self._effort.enough(self._entries[name].samples, self._calls(name))
        ]

    def _calls(self, name: str) -> int:
        return self._entries[name].calls_per_sample

    def _settle(self, group: list[str]) -> None:
        """Let the threads of another process fall asleep, and wake up one's own."""
        hungry = self._hungry(group)
        if hungry:
            time.sleep(_SETTLE_SECONDS)
        for name in hungry:
            with self._blaming(name):
                self._runnables[name].time(1)

    def _sample(self, name: str) -> None:
        if name in self._runnables:
            with self._blaming(name):
                entry, runnable, calls = self._entries[name], self._runnables[name], self._calls(name)
                entry.samples.append(runnable.time(calls))
                training = runnable.time_training(calls)
                if training is not None:
                    entry.training_samples.append(training)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def first_line(error: Exception) -> str:
    """An error as one line that fits a table or a log."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
