"""Which kernels run a layer on a GPU: the choice is csrc/cuda/plan.cpp's, and can be forced for a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ._extension import load

_C = load()


@contextlib.contextmanager
def force_plan(strategy: str) -> Iterator[None]:
    """Makes layers on CUDA tensors use one strategy wherever it can run, for tests and benchmarks.

    Args:
        strategy: ``"step"`` (a matrix product and a pointwise kernel each time step) or ``"step_fused"`` (one kernel
            each time step, which multiplies as well; not with a projection).

    Raises:
        ValueError: there is no such strategy.

    It holds for the whole process, other threads included, since a backward pass runs on threads of its own. What was
    forced before holds again afterwards.

    Example::

        with fused_rnn.force_plan("step"):
            output, hn = layer(input)
    """
    before = _C.forced_plan()
    _C.force_plan(strategy)
    try:
        yield
    finally:
        _C.force_plan(before)
