"""A peer's own process: `python -m fused_rnn_bench.peers.worker MODULE` serves one inference engine.

Engines bring thread pools that spin between calls and slow down whoever shares their process, and torch's
slows them down in turn. So each has a process to itself, without torch in it, and is measured while the
others rest. Requests and replies are pickles on stdin and stdout: (verb, argument) and (succeeded, value or
text).
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from fused_rnn_bench.case import Case, case_from_json
from fused_rnn_bench.timing import CpuStopwatch

Arrays = dict[str, np.ndarray]


class Engine:
    """One engine and the network that it holds at the moment."""

    def __init__(self, module: str) -> None:
        self._open = importlib.import_module(f".{module}", __package__).open_session
        self._stopwatch = CpuStopwatch()
        self._call: Callable[[], Any] = _nothing_prepared
        self._read: Callable[[], Arrays] = _nothing_prepared

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build the network with all threads and with one, keep the faster, and return its settings."""
        from .onnx_graph import build_model

        case: Case = case_from_json(request["case"])
        model = build_model(case, request["weights"])
        best = None
        for threads in sorted({request["threads"], 1}, reverse=True):
            call, read = self._open(model, request["feeds"], threads, case.dtype)
            calls = self._stopwatch.calibrate(call, 0.02)
            seconds = min(self._stopwatch.time(call, calls) for _ in range(3))
            if best is None or seconds < best[0]:
                best = (seconds, threads, call, read)
        _, threads, self._call, self._read = best
        return {"threads": threads}

    def outputs(self, _: None) -> Arrays:
        self._call()
        return self._read()

    def calibrate(self, sample_seconds: float) -> int:
        return self._stopwatch.calibrate(self._call, sample_seconds)

    def time(self, calls: int) -> float:
        return self._stopwatch.time(self._call, calls)


def _nothing_prepared() -> Any:
    raise RuntimeError("no network has been prepared")


def serve(module: str) -> None:
    """Answer requests until stdin closes."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an engine prints must not land among the replies
    requests = sys.stdin.buffer
    engine = None
    while True:
        try:
            verb, argument = pickle.load(requests)
        except EOFError:
            return
        try:
            engine = engine or Engine(module)
            reply = (True, getattr(engine, verb)(argument))
        except Exception as error:  # the error belongs to whoever asked
            reply = (False, f"{type(error).__name__}: {error}")
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
