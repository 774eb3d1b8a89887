"""Says which kernel and tile a shape would take, and why. Asks the planner itself; runs nothing."""

from __future__ import annotations

from typing import Any

from .case import GATES, LAYERS, Case
from .errors import BenchError

# The planner's names for the cells.
_PLANNER_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "rnn_relu": "rnn_relu"}
assert set(_PLANNER_CELLS) == set(LAYERS) <= set(GATES)


def explain(
    cell: str,
    shape: tuple[int, int, int, int],
    *,
    device: str,
    dtype: str,
    training: bool,
    projection: int,
    directions: int,
    threads: int,
    arch: str | None,
) -> dict[str, Any]:
    """The plan for one layer as the planner gives it: a flat dictionary, `why` among its keys.

    On a GPU the backward pass has a plan of its own, under names that begin with `backward_`.
    """
    T, B, I, H = shape
    if projection and (cell != "lstm" or projection >= H):
        raise BenchError("--proj needs the lstm cell and a size below the hidden size")
    try:
        from fused_rnn import _C
    except ImportError as error:
        raise BenchError(f"fused_rnn's extension cannot be imported: {error}") from error
    name = _PLANNER_CELLS[cell]
    try:
        if device == "cpu":
            if arch is not None:
                raise BenchError(
                    "--arch is for --device cuda; the CPU's instruction set is found at run time"
                )
            return _C.cpu_plan(name, T, B, I, H, projection, directions, threads, training, dtype)
        if not hasattr(_C, "plan"):
            raise BenchError("this build of fused_rnn has no CUDA planner, so there is no CUDA plan to show")
        return _C.plan(
            cell=name, dtype=dtype, T=T, B=B, I=I, H=H, P=projection,
            directions=directions, training=training, arch=arch or "",
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise BenchError(f"the planner refuses this: {_first_line(error)}") from error


def strategies(case: Case) -> dict[str, str]:
    """How the kernels of fused_rnn run a case on this machine's GPU, by pass, and as `plan` the strategy that was asked
    for, if one was; empty for other cases."""
    if case.device != "cuda" or not case.is_layer:
        return {}
    plan = explain(
        case.cell, (case.T, case.B, case.I, case.H), device="cuda", dtype=case.dtype, training=case.training,
        projection=0, directions=case.directions, threads=1, arch=None,
    )  # fmt: skip
    found = {name: plan[name] for name in ("strategy", "backward_strategy") if name in plan}
    from fused_rnn import _C

    asked = _C.forced_plan()
    return found | ({"plan": asked} if asked else {})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
