"""How a call is timed. Imports no torch, so that a peer's own process can use the CPU half alone.

CPU: a sample is a batch of calls between two readings of the clock, so that a call of ten microseconds is
measured as well as one of ten seconds. GPU: a sample is one call between two CUDA events, with the L2 cache
flushed before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

Call = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long one contender is measured: until `samples` and `seconds` are both reached.

    A slow call is stopped after `longest` seconds once it has `least` samples, a fast one after `most`.
    """

    sample_seconds: float = 0.004
    samples: int = 15
    seconds: float = 0.2
    longest: float = 2.0
    least: int = 3
    most: int = 200

    def enough(self, samples: Sequence[float], calls_per_sample: int) -> bool:
        """Whether these samples (seconds a call) will do."""
        count, spent = len(samples), sum(samples) * calls_per_sample
        if count >= self.most:
            return True
        if spent >= self.longest:
            return count >= self.least
        return count >= self.samples and spent >= self.seconds


class CpuStopwatch:
    """Wall clock around a batch of calls."""

    def time(self, call: Call, calls: int) -> float:
        """Seconds a call, over a batch of this many."""
        start = time.perf_counter_ns()
        for _ in repeat(None, calls):
            call()
        return (time.perf_counter_ns() - start) * 1e-9 / calls

    def calibrate(self, call: Call, sample_seconds: float) -> int:
        """How many calls make a sample of about this length. Warms the call up on the way."""
        calls = 1
        while True:
            per_call = self.time(call, calls)
            if per_call * calls >= sample_seconds / 4:
                return max(1, math.ceil(sample_seconds / per_call))
            calls *= 4


class CudaStopwatch:
    """CUDA events around one call, after a flush of the L2 cache.

    An eager call starts on an idle device: its time holds the launches that a user waits for. A captured
    graph is queued behind the flush: its time is the device's alone.
    """

    def __init__(self, captured: bool) -> None:
        import torch

        self._torch = torch
        self._captured = captured
        self._flush = _larger_than_l2()
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def time(self, call: Call, calls: int) -> float:
        """Seconds a call; the mean over `calls` separate samples."""
        total = 0.0
        for _ in range(calls):
            self._flush.zero_()
            if not self._captured:
                self._torch.cuda.synchronize()
            self._start.record()
            call()
            self._end.record()
            self._end.synchronize()
            total += self._start.elapsed_time(self._end) * 1e-3
        return total / calls

    def calibrate(self, call: Call, sample_seconds: float) -> int:
        """Always one call a sample (the cache is flushed between calls); three calls to warm up."""
        self.time(call, 3)
        return 1


@cache
def _larger_than_l2() -> Any:
    """A tensor to write over, so that nothing else stays in the L2 cache; one for all stopwatches."""
    import torch

    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(max(2 * l2, 1 << 26), dtype=torch.uint8, device="cuda")


def stopwatch(device: str, captured: bool = False) -> CpuStopwatch | CudaStopwatch:
    """The stopwatch for a device."""
    return CudaStopwatch(captured) if device == "cuda" else CpuStopwatch()
