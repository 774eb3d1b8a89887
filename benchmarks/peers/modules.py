"""The two contenders with torch.nn's own interface: torch.nn itself, and fused_rnn."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from fused_rnn_bench.case import Case
from fused_rnn_bench.explain import strategies
from fused_rnn_bench.problem import Problem, build_module, module_call

from .base import Contender, LocalRunnable


class ModuleContender(Contender):
    """Anything whose classes are drop-ins for torch.nn's."""

    runnable: ClassVar[type[LocalRunnable]] = LocalRunnable

    def namespace(self) -> ModuleType:
        raise NotImplementedError

    def missing(self) -> str | None:
        return None

    def refuses(self, case: Case) -> str | None:
        return None

    def prepare(self, problem: Problem) -> LocalRunnable:
        case = problem.case
        module = build_module(self.namespace(), case, problem.x.dtype, case.device)
        return self.runnable(module_call(module, problem), case)


class TorchNN(ModuleContender):
    name = "torch"

    def namespace(self) -> ModuleType:
        return torch.nn

    def version(self) -> str:
        return torch.__version__


class _Planned(LocalRunnable):
    def settings(self) -> dict[str, Any]:
        return strategies(self._case)


class _Penalized(_Planned):
    """Knows the same case without a penalty, `training`, to be measured beside it."""

    training: LocalRunnable

    def time_training(self, calls: int) -> float:
        return self.training.time(calls)


class FusedRnn(ModuleContender):
    name = "fused_rnn"
    runnable = _Planned

    def namespace(self) -> ModuleType:
        return importlib.import_module("fused_rnn")

    def prepare(self, problem: Problem) -> LocalRunnable:
        if problem.case.mode != "penalty":
            return super().prepare(problem)
        module = build_module(self.namespace(), problem.case, problem.x.dtype, problem.case.device)
        runnable = _Penalized(module_call(module, problem), problem.case)
        runnable.training = super().prepare(replace(problem, case=replace(problem.case, mode="train")))
        return runnable

    def missing(self) -> str | None:
        try:
            self.namespace()
        except ImportError as error:
            return f"fused_rnn cannot be imported: {error}"
        return None

    def version(self) -> str:
        return str(getattr(self.namespace(), "__version__", "unknown"))
