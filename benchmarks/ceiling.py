"""Measures the roof of the roofline: the matrix product and copy rates that torch reaches here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .cost import Ceiling
from .precision import TORCH_DTYPES, precision

_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_COPY_SIZES = {"cpu": [1 << power for power in range(19, 29)], "cuda": [1 << 30]}


def measure_ceiling(device: str, dtypes: Iterable[str], progress: Callable[[str], None] = print) -> Ceiling:
    """Matmul rate for each dtype and copy rate by working set: a second or two."""
    matmul = {}
    for dtype in dtypes:
        progress(f"matrix product rate, {dtype}")
        matmul[dtype] = _matmul_rate(device, dtype)
    progress("copy rate")
    return Ceiling(matmul, [(size, _copy_rate(device, size)) for size in _COPY_SIZES[device]])


def _best_seconds(call: Callable[[], object], device: str, budget: float) -> float:
    """The fastest of at least 3 calls, in about `budget` seconds: a ceiling is a best, not a median."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 1000):
        _synchronize(device)
        start = time.perf_counter_ns()
        call()
        _synchronize(device)
        times.append((time.perf_counter_ns() - start) * 1e-9)
    return min(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _matmul_rate(device: str, dtype: str) -> float:
    n = _MATMUL_SIZE[device]
    with precision(dtype, device), torch.inference_mode():
        left = torch.randn(n, n, device=device).to(TORCH_DTYPES[dtype])
        right = torch.randn(n, n, device=device).to(TORCH_DTYPES[dtype])
        return 2 * n**3 / min(_best_seconds(call, device, 0.3) for call in _products(left, right))


def _products(left: Tensor, right: Tensor) -> Iterator[Callable[[], Tensor]]:
    """The ways in which torch multiplies. On a CPU it has two libraries for float32, and on an AMD CPU that of ``mm``
    reaches half of what that of ``linear`` does."""
    out = torch.empty_like(left)
    yield lambda: torch.mm(left, right, out=out)
    if left.is_cpu and left.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        blocked = left.to_mkldnn(), right.to_mkldnn()
        yield lambda: torch.nn.functional.linear(*blocked)


def _copy_rate(device: str, working_set: int) -> float:
    with torch.inference_mode():
        source = torch.ones(working_set // 8, device=device)
        target = torch.empty_like(source)
        return working_set / _best_seconds(lambda: target.copy_(source), device, 0.05)
