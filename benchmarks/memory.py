"""The memory of one training step.

GPU: the highest allocation during the step above what was there before. CPU: torch counts no allocations, so
the bytes that the forward pass keeps for backward are counted instead, each storage once, the parameters and
inputs themselves left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def training_memory(call: Callable[[], Any], leaves: Iterable[torch.Tensor], device: str) -> dict[str, Any]:
    """`{"kind": "peak" | "saved", "bytes": ...}` for one call of a training step."""
    if device == "cuda":
        return {"kind": "peak", "bytes": _peak_bytes(call)}
    return {"kind": "saved", "bytes": _saved_bytes(call, leaves)}


def _peak_bytes(call: Callable[[], Any]) -> int:
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
