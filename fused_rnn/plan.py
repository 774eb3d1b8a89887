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
        strategy: one of

            - ``"step"``: a matrix product and a pointwise kernel each time step
            - ``"step_fused"``: one kernel each time step, which multiplies as well; not with a projection
            - ``"block"``, ``"cluster"``, ``"grid"``: one kernel for all time steps, which keeps the recurrent weights
              on the chip in one block, in the blocks of a cluster (sm_90), or in blocks all over the GPU. For layers in
              float16, bfloat16 and float32 with TF32, without a projection, up to the hidden size that fits
            - ``"persistent"``: whichever of these three is expected to be the fastest

            A pass that a strategy cannot run takes the one that it would take otherwise. Persistent kernels that are
            asked for run without the check of their first use.
            ``fused-rnn-bench explain --device cuda`` says which one that is, and why.

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
