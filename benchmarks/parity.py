"""The tolerance law: what makes a contender's result right enough to be timed.

Our largest error against a float64 reference is at most twice torch.nn's own largest error in the same dtype
on the same numbers, plus one rounding of the dtype at the scale of the output. Judged for each output and
each gradient by itself. On a tensor of few numbers torch.nn's error may be small by luck and says little of
its accuracy; so in small cases, where that costs nothing, its largest error over a few draws of numbers counts.

In float64 the reference is torch.nn itself, whose own error cannot be seen in it. Rounding errors are
proportional to the rounding unit, so it is measured in float32 and scaled to float64. The reference then is
no nearer to the truth than the law lets us be, so the two may be twice as far apart.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .precision import ROUNDING, TORCH_DTYPES
from .problem import Outputs, Problem, build_module, make_problem, module_call

# Further draws of a case whose output has no more numbers than this.
_SMALL, _DRAWS = 10_000, 3


@dataclass(frozen=True)
class Verdict:
    """How a contender did on the output where it did worst, as a part of what the law allows."""

    tensor: str
    error: float
    allowed: float
    torch_error: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """The error as a multiple of the allowed one."""
        if self.allowed > 0:
            return self.error / self.allowed
        return 0.0 if self.error == 0 else math.inf

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return (
            f"{self.tensor}: error {self.error:.2e} where {self.allowed:.2e} is allowed "
            f"(torch.nn's own error is {self.torch_error:.2e})"
        )

    def to_json(self) -> dict[str, Any]:
        """The verdict for a file. JSON knows no infinity, so an error that is none becomes null."""
        data = asdict(self) | {"ok": self.ok}
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in data.items()}  # fmt: skip


def torch_outputs(problem: Problem, dtype: torch.dtype) -> Outputs:
    """torch.nn's outputs for the numbers of the problem, computed in this dtype."""
    module = build_module(nn, problem.case, dtype, problem.case.device)
    prepared = module_call(module, problem.to(dtype))
    with torch.inference_mode(not problem.training):
        return {name: value.detach() for name, value in prepared.collect(prepared.call()).items()}


class Judge:
    """Knows the reference and torch.nn's errors of one problem, and judges the other contenders."""

    def __init__(self, problem: Problem, outputs: Outputs) -> None:
        """`outputs` are torch.nn's own, in the dtype of the case."""
        self._reference = torch_outputs(problem, torch.float64)
        rounding = ROUNDING[problem.case.dtype]
        case = problem.case
        small = case.T * case.B * case.H * case.directions <= _SMALL
        others = [make_problem(case, draw) for draw in range(1, 1 + _DRAWS)] if small else []
        if case.dtype == "fp64":
            errors = [_scaled_errors(p) for p in (problem, *others)]
            sides = 2
        else:
            errors = [_errors(outputs, self._reference)]
            for other in others:
                own = torch_outputs(other, TORCH_DTYPES[case.dtype])
                errors.append(_errors(own, torch_outputs(other, torch.float64)))
            sides = 1
        self._torch_errors = {name: max(e[name] for e in errors) for name in self._reference}
        self._allowed = {
            name: sides * (2 * self._torch_errors[name] + rounding * _largest(exact))
            for name, exact in self._reference.items()
        }

    def judge(self, outputs: Outputs, must_have_all: bool = True) -> Verdict:
        """The worst of the outputs. A peer that offers only some of them is judged on those."""
        worst = None
        for name, exact in self._reference.items():
            if name not in outputs:
                if must_have_all:
                    return self._wrong(name, f"{name} is missing")
                continue
            if outputs[name].shape != exact.shape:
                got, expected = list(outputs[name].shape), list(exact.shape)
                return self._wrong(name, f"{name} has shape {got}, expected {expected}")
            error = _largest_error(outputs[name], exact)
            verdict = Verdict(name, error, self._allowed[name], self._torch_errors[name])
            if not math.isfinite(error):
                return self._wrong(name, f"{name} is not finite where the reference is")
            if worst is None or verdict.ratio > worst.ratio:
                worst = verdict
        return worst if worst is not None else self._wrong("", "no output in common with torch.nn")

    def _wrong(self, name: str, problem: str) -> Verdict:
        return Verdict(
            name, math.inf, self._allowed.get(name, 0.0), self._torch_errors.get(name, 0.0), problem
        )


def _scaled_errors(problem: Problem) -> dict[str, float]:
    """torch.nn's error in float32 on the same numbers, scaled down to the rounding unit of float64."""
    rounded = problem.to(torch.float32)
    errors = _errors(torch_outputs(rounded, torch.float32), torch_outputs(rounded, torch.float64))
    return {name: error * ROUNDING["fp64"] / ROUNDING["fp32"] for name, error in errors.items()}


def _errors(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    return {name: _largest_error(outputs[name], exact) for name, exact in reference.items()}


def _largest(value: torch.Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _largest_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    difference = value.detach().to(torch.float64) - exact.to(value.device)
    # max() of a tensor with a NaN is NaN, which no comparison would catch: call it infinite.
    error = _largest(difference)
    return math.inf if math.isnan(error) else error
