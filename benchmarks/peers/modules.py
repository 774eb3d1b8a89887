"""The two contenders with torch.nn's own interface: torch.nn itself, and fused_rnn."""

from __future__ import annotations

import importlib
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


class FusedRnn(ModuleContender):
    name = "fused_rnn"
    runnable = _Planned

    def namespace(self) -> ModuleType:
        return importlib.import_module("fused_rnn")

    def missing(self) -> str | None:
        try:
            self.namespace()
        except ImportError as error:
            return f"fused_rnn cannot be imported: {error}"
        return None

    def version(self) -> str:
        return str(getattr(self.namespace(), "__version__", "unknown"))
