"""Runs the cases one after another within the time and memory there is, and keeps what is done."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from .case import Case
from .cost import call_seconds, memory_needed
from .environment import available_memory
from .measure import LeaveOut, Measurement
from .peers.base import Contender
from .results import Record, Results
from .timing import Effort


class Progress(Protocol):
    """Who is told how the run is going."""

    def started(self, case: Case) -> None: ...

    def finished(self, case: Case, record: Record | None, left_out: str) -> None: ...


class Runner:
    """Measures cases with the same contenders, effort and budget (in seconds; None is no limit)."""

    def __init__(self, contenders: Sequence[Contender], effort: Effort, budget: float | None) -> None:
        self._contenders = contenders
        self._effort = effort
        self._budget = budget

    def run(self, cases: Sequence[Case], results: Results, progress: Progress) -> None:
        """Add to `results` until done or interrupted. A Ctrl-C ends the run and is noted, not raised."""
        started = time.perf_counter()
        try:
            for case in cases:
                progress.started(case)
                left = None if self._budget is None else self._budget - (time.perf_counter() - started)
                record = None
                reason = self._too_much(case, results, left)
                if not reason:
                    try:
                        record = Measurement(case, self._contenders, self._effort).run()
                        results.records.append(record)
                    except LeaveOut as error:
                        reason = str(error)
                if reason:
                    results.leave_out(case, reason)
                progress.finished(case, record, reason)
                _tidy(case.device)
        except KeyboardInterrupt:
            results.interrupted = True

    def _too_much(self, case: Case, results: Results, seconds_left: float | None) -> str:
        """Why the case does not fit into what is left of memory or time, or nothing."""
        needed, available = memory_needed(case), available_memory(case.device)
        if available is not None and needed > 0.8 * available:
            return f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
        if seconds_left is None:
            return ""
        call = call_seconds(case, results.ceiling)
        measured = min(max(self._effort.least * call, self._effort.seconds), self._effort.longest + call)
        # Each contender runs twice before it is measured; the float64 reference takes about twice as long.
        predicted = len(self._contenders) * (2 * call + measured) + 2 * call
        if predicted > seconds_left:
            return f"would take about {predicted:.0f} s, {max(seconds_left, 0):.0f} s of the budget are left"
        return ""


def _tidy(device: str) -> None:
    """Give back what the case held before the next one is judged by what is free."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
