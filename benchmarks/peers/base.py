"""The interface of a contender. A new peer is one subclass of `Contender` and one line in `registry.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from fused_rnn_bench.case import Case
from fused_rnn_bench.memory import training_memory
from fused_rnn_bench.problem import Outputs, Prepared, Problem
from fused_rnn_bench.timing import stopwatch


class Runnable(ABC):
    """A contender that stands ready to run one problem, again and again."""

    @abstractmethod
    def outputs(self) -> Outputs:
        """Run once and name what came out, in torch's layout and as tensors."""

    @abstractmethod
    def calibrate(self, sample_seconds: float) -> int:
        """How many calls make one sample."""

    @abstractmethod
    def time(self, calls: int) -> float:
        """Seconds a call, over this many calls."""

    def time_training(self, calls: int) -> float | None:
        """Of a case with a penalty, seconds a step without one, or None where nobody asks."""
        return None

    def memory(self) -> dict[str, Any] | None:
        """Memory of a training step, or None where it cannot be seen."""
        return None

    def settings(self) -> dict[str, Any]:
        """What was chosen for this problem and belongs in the result file."""
        return {}


class LocalRunnable(Runnable):
    """A call in this process, eager or, on a GPU, captured in a CUDA graph.

    Only the calls run under `torch.inference_mode`, as in a server: modules are made and loaded outside it.
    """

    def __init__(self, prepared: Prepared, case: Case) -> None:
        self._case = case
        self._prepared = prepared
        self._stopwatch = stopwatch(case.device, case.graph)
        with self._mode():
            self._call = _captured(prepared.call) if case.graph else prepared.call

    def _mode(self) -> AbstractContextManager:
        return torch.inference_mode(self._case.mode == "infer")

    def outputs(self) -> Outputs:
        with self._mode():
            return {name: value.detach() for name, value in self._prepared.collect(self._call()).items()}

    def calibrate(self, sample_seconds: float) -> int:
        with self._mode():
            return self._stopwatch.calibrate(self._call, sample_seconds)

    def time(self, calls: int) -> float:
        with self._mode():
            return self._stopwatch.time(self._call, calls)

    def memory(self) -> dict[str, Any] | None:
        if self._case.mode != "train" or self._case.graph:
            return None
        return training_memory(self._prepared.call, self._prepared.leaves, self._case.device)


def _captured(call: Any) -> Any:
    """Capture a call in a CUDA graph; what is returned replays it and gives the same tensors each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


class Contender(ABC):
    """One library that can run the cases."""

    name: ClassVar[str]
    # True for a contender with threads of its own, which would slow down whoever shares the process with it.
    isolated: ClassVar[bool] = False

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.threads = threads

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used here at all ("not installed"), or None."""

    @abstractmethod
    def refuses(self, case: Case) -> str | None:
        """Why it cannot run this case, or None."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Runnable:
        """Build the network from the problem's weights and make it ready to run."""

    def version(self) -> str:
        """The version of the library, for the result file."""
        return "unknown"

    def close(self) -> None:  # noqa: B027  most contenders have started nothing
        """End what it started (a process)."""


def first_reason(*reasons: tuple[bool, str]) -> str | None:
    """The text of the first condition that holds: how `refuses` is written."""
    return next((text for holds, text in reasons if holds), None)
