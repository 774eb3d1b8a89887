"""ONNX Runtime and OpenVINO: CPU inference engines, each in a process of its own (see worker.py)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
from typing import Any, ClassVar

import torch
from fused_rnn_bench.case import Case
from fused_rnn_bench.cost import weight_count
from fused_rnn_bench.problem import Outputs, Problem
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .base import Contender, Runnable, first_reason

# An ONNX model is one protobuf message, which cannot exceed 2 GiB.
_LARGEST_MODEL = 2**31 - 2**20


class _Worker:
    """The client's end of a worker process, started when first needed."""

    def __init__(self, module: str) -> None:
        command = [sys.executable, "-m", f"{__package__}.worker", module]
        # A session of its own: a Ctrl-C in the terminal is for the run, which ends its workers itself.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def ask(self, verb: str, argument: Any = None) -> Any:
        try:
            pickle.dump((verb, argument), self._process.stdin)
            self._process.stdin.flush()
            succeeded, value = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"its process ended with status {self._process.wait(5)}") from error
        if not succeeded:
            raise RuntimeError(value)
        return value

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # what a dead process has not read of a request
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class RemoteRunnable(Runnable):
    """A network that an engine holds in its worker."""

    def __init__(self, worker: _Worker, problem: Problem, settings: dict[str, Any]) -> None:
        self._worker = worker
        self._case = problem.case
        self._settings = settings

    def settings(self) -> dict[str, Any]:
        return self._settings

    def outputs(self) -> Outputs:
        arrays = self._worker.ask("outputs")
        named = {name: torch.from_numpy(value) for name, value in arrays.items()}
        if not self._case.is_layer:
            del named["output"]
            return {name: value[0] for name, value in named.items()}
        if self._case.lengths != "dense":
            lengths = torch.tensor(self._case.sequence_lengths())
            named["output"] = pack_padded_sequence(named["output"], lengths).data
        return named

    def calibrate(self, sample_seconds: float) -> int:
        return self._worker.ask("calibrate", sample_seconds)

    def time(self, calls: int) -> float:
        return self._worker.ask("time", calls)


class EngineContender(Contender):
    """A CPU inference engine that reads ONNX."""

    isolated = True
    packages: ClassVar[tuple[str, ...]]
    session: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]

    def __init__(self, device: str, threads: int) -> None:
        super().__init__(device, threads)
        self._worker: _Worker | None = None

    def missing(self) -> str | None:
        if self.device != "cpu":
            return "measured for CPU inference only"
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def refuses(self, case: Case) -> str | None:
        return first_reason(
            (case.mode != "infer", "runs inference only"),
            (case.dtype not in self.dtypes, f"no {case.dtype}"),
            (weight_count(case) * 4 > _LARGEST_MODEL, "the model is too large for one ONNX file"),
        )

    def prepare(self, problem: Problem) -> RemoteRunnable:
        if self._worker and not self._worker.alive():
            self.close()  # an engine crashed in an earlier case
        self._worker = self._worker or _Worker(self.session)
        request = {
            "case": problem.case.to_json(),
            "weights": {name: value.float().numpy() for name, value in problem.weights.items()},
            "feeds": _feeds(problem),
            "threads": self.threads,
        }
        return RemoteRunnable(self._worker, problem, self._worker.ask("prepare", request))

    def version(self) -> str:
        return importlib.metadata.version(self.packages[0])

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class OnnxRuntime(EngineContender):
    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")
    session = "ort_session"
    dtypes = ("fp32",)


class OpenVino(EngineContender):
    name = "openvino"
    packages = ("openvino", "onnx")
    session = "ov_session"
    dtypes = ("fp32", "bf16")


def _feeds(problem: Problem) -> dict[str, Any]:
    """The model's inputs as arrays: padded, with lengths, where torch has a packed sequence."""
    if problem.batch_sizes is None:
        feeds = {"x": problem.x.float().numpy()}
    else:
        x, lengths = pad_packed_sequence(PackedSequence(problem.x.float(), problem.batch_sizes))
        feeds = {"x": x.numpy(), "lengths": lengths.int().numpy()}
    for name, value in zip(("h_0", "c_0"), problem.state, strict=False):
        feeds[name] = value.float()[None].numpy()
    return feeds
