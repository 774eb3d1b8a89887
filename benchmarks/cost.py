"""What a case costs on paper: operations, compulsory traffic, memory needed, a guess of its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .case import GATES, Case


@dataclass(frozen=True)
class Ceiling:
    """The rates that this machine reached at the start of the run: the roof of the roofline.

    `matmul` is FLOP/s of a square product for each dtype, `copy` is a list of (working set in bytes, bytes/s
    read plus written): one pair on a GPU, whose L2 is flushed, several on a CPU, whose caches are warm.
    """

    matmul: dict[str, float]
    copy: Sequence[tuple[float, float]] = field(default_factory=list)

    def copy_rate(self, working_set: float) -> float:
        """Bytes/s for a working set of this size: interpolated between the measured sizes, on log axes."""
        points = sorted(self.copy)
        if working_set <= points[0][0]:
            return points[0][1]
        for (small, fast), (large, slow) in pairwise(points):
            if working_set <= large:
                part = math.log(working_set / small) / math.log(large / small)
                return fast * (slow / fast) ** part
        return points[-1][1]

    def seconds(self, case: Case) -> float:
        """The least time the case can take under this roof: products or traffic, whichever is longer."""
        traffic = compulsory_bytes(case)
        return max(flops(case) / self.matmul[case.dtype], traffic / self.copy_rate(traffic))


def _input_sizes(case: Case) -> list[int]:
    """The input size of each layer of the stack."""
    return [case.I] + [case.directions * case.H] * (case.layers - 1)


def weight_count(case: Case) -> int:
    """Number of parameters, biases included."""
    gate_rows = case.directions * GATES[case.cell] * case.H
    return sum(gate_rows * (size + case.H + 2) for size in _input_sizes(case))


# Matrix products as multiples of a forward's two. A training step's gradients of the weights, of the state and of the
# input are four more. With a penalty these are made twice, and the second derivative, where both factors of each of the
# six change, is twelve.
_PRODUCTS = {"infer": 1, "train": 3, "penalty": 11}


def flops(case: Case) -> int:
    """Operations of the matrix products; gate maths is not counted."""
    gate_rows = case.directions * GATES[case.cell] * case.H
    forward = sum(2 * gate_rows * (size + case.H) for size in _input_sizes(case)) * case.frames
    return forward * _PRODUCTS[case.mode]


def compulsory_bytes(case: Case) -> int:
    """Traffic that no kernel can avoid: weights, input and output once; in training their gradients too."""
    values = weight_count(case) + case.frames * (case.I + case.directions * case.H)
    return values * case.item_bytes * (2 if case.training else 1)


def memory_needed(case: Case) -> int:
    """A guess, on the safe side, of what measuring the case takes: two contenders and a float64 reference."""
    per_frame = case.I + case.layers * case.directions * case.H * (GATES[case.cell] + 4)
    if case.mode == "penalty":  # torch.nn records every operation of a step, and those of its backward pass
        per_frame *= 8
    weights = weight_count(case) * (2 if case.training else 1)
    return case.frames * per_frame * (8 + 2 * case.item_bytes) + weights * (8 + 4 * case.item_bytes)


def call_seconds(case: Case, ceiling: Ceiling) -> float:
    """A guess of one call: a fifth of the matmul rate, and 5 us a step for everything else."""
    steps = case.T * case.layers * _PRODUCTS[case.mode]
    return 5 * flops(case) / ceiling.matmul[case.dtype] + 5e-6 * steps
