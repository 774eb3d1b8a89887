"""The memory of one training step.

Its peak is the highest allocation during the step above what was there before, as torch's allocator counts it: on a
CPU the scratch of libraries that allocate by themselves (oneDNN's, and our rearranged weights) is not in it. On a CPU
the bytes that the forward pass keeps for backward are counted too, each storage once, the parameters and inputs
themselves left out.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler announces every start and stop on the terminal, unless told this before it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")


def training_memory(call: Callable[[], Any], leaves: Iterable[torch.Tensor], device: str) -> dict[str, Any]:
    """`{"kind": "peak", "bytes": ...}` for one call of a training step on a GPU; on a CPU `{"kind": "saved", "bytes":
    ..., "peak_bytes": ...}`."""
    if device == "cuda":
        return {"kind": "peak", "bytes": _peak_bytes_cuda(call)}
    return {"kind": "saved", "bytes": _saved_bytes(call, leaves), "peak_bytes": _peak_bytes_cpu(call)}


def _peak_bytes_cpu(call: Callable[[], Any]) -> int:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _peak_bytes_cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _saved_bytes(call: Callable[[], Any], leaves: Iterable[torch.Tensor]) -> int:
    given = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Everything saved stays alive until backward, so an address cannot mean two storages.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(saved.values())
