"""Haste (LMNT): fused LSTM and GRU layers for NVIDIA GPUs, in float32 and float64."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from fused_rnn_bench.case import GATES, Case
from fused_rnn_bench.problem import Outputs, Prepared, Problem

from .base import Contender, LocalRunnable, first_reason

# For each gate in torch's order, its place in Haste's: LSTM i, g, f, o and GRU z, r, n.
_TORCH_ORDER = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}


class Haste(Contender):
    name = "haste"

    def missing(self) -> str | None:
        return first_reason(
            (self.device != "cuda", "runs on a GPU only"),
            (importlib.util.find_spec("haste_pytorch") is None, "not installed: haste_pytorch"),
        )

    def refuses(self, case: Case) -> str | None:
        return first_reason(
            (case.cell not in _TORCH_ORDER, f"has no {case.cell}"),
            (case.dtype not in ("fp32", "fp64"), f"no {case.dtype}"),
            (case.layers > 1 or case.bidirectional, "one layer in one direction only"),
            (case.lengths != "dense", "no packed sequences"),
            (case.mode == "penalty", "no second derivative"),
        )

    def prepare(self, problem: Problem) -> LocalRunnable:
        case = problem.case
        haste = importlib.import_module("haste_pytorch")
        layer = {"lstm": haste.LSTM, "gru": haste.GRU}[case.cell](case.I, case.H)
        layer = layer.to(device=case.device, dtype=problem.x.dtype)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        layer.from_native_weights(*(problem.weights[name] for name in names))
        layer.train(problem.training)
        x = problem.x.detach().clone().requires_grad_(problem.training)
        kernels = (layer.kernel, layer.recurrent_kernel)
        wanted = (x, *kernels, *(value for name, value in layer.named_parameters() if "bias" in name))

        def infer() -> Any:
            return layer(x), ()

        def train() -> Any:
            result = layer(x)
            return result, torch.autograd.grad(result[0], wanted, problem.cotangent)

        def collect(returned: Any) -> Outputs:
            (output, state), gradients = returned
            named = {"output": output}
            named |= {"h_n": state[0], "c_n": state[1]} if case.has_cell_state else {"h_n": state}
            if gradients:
                named["grad input"] = gradients[0]
                named["grad weight_ih_l0"] = _to_torch(case, gradients[1])
                named["grad weight_hh_l0"] = _to_torch(case, gradients[2])
            return named

        return LocalRunnable(Prepared(train if problem.training else infer, collect, wanted), case)


def _to_torch(case: Case, kernel: torch.Tensor) -> torch.Tensor:
    """A gradient [I, G*H] in Haste's gate order as [G*H, I] in torch's."""
    gates = kernel.t().unflatten(0, (GATES[case.cell], case.H))
    return gates[list(_TORCH_ORDER[case.cell])].flatten(0, 1)
