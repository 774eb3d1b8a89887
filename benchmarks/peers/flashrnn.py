"""FlashRNN (NX-AI): fused recurrences for NVIDIA GPUs. Compiles a kernel for every new shape when prepared.

FlashRNN starts at the gates' pre-activations, so the input projection is a torch product here, inside the
timed call, as the layers of the other contenders have it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
from fused_rnn_bench.case import GATES, Case
from fused_rnn_bench.problem import Outputs, Prepared, Problem
from torch import Tensor
from torch.nn import functional

from .base import Contender, LocalRunnable, first_reason

_FUNCTIONS = {"lstm": "lstm", "gru": "gru", "rnn": "elman"}
# Its float32 kernels multiply in tf32.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32"}


class FlashRnn(Contender):
    name = "flashrnn"
    # FlashRNN's choice of kernel; it falls back to "cuda" itself for the GRU.
    backend = "cuda_fused"

    def missing(self) -> str | None:
        return first_reason(
            (self.device != "cuda", "runs on a GPU only"),
            (importlib.util.find_spec("flashrnn") is None, "not installed: flashrnn"),
        )

    def refuses(self, case: Case) -> str | None:
        return first_reason(
            (case.cell not in _FUNCTIONS, f"has no {case.cell}"),
            (case.dtype not in _DTYPES, f"no {case.dtype}"),
            (case.layers > 1 or case.bidirectional, "one layer in one direction only"),
            (case.lengths != "dense", "no packed sequences"),
            (case.mode == "penalty", "no second derivative"),
        )

    def version(self) -> str:
        return importlib.metadata.version("flashrnn")

    def prepare(self, problem: Problem) -> LocalRunnable:
        case = problem.case
        return LocalRunnable(flashrnn_call(problem, self.backend, _DTYPES[case.dtype]), case)


def flashrnn_call(problem: Problem, backend: str, dtype: str) -> Prepared:
    """The problem as a call of FlashRNN. Shapes there: Wx [B, T, G, 1, H], R [G, 1, H, H], b [G, 1, H]."""
    flashrnn = importlib.import_module("flashrnn").flashrnn
    case = problem.case
    gates = GATES[case.cell]

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_(problem.training)

    x, w = leaf(problem.x), leaf(problem.weights["weight_ih_l0"])
    r, b = (leaf(value) for value in _recurrent_weights(case, problem.weights))

    def forward() -> tuple[Tensor, Tensor]:
        wx = functional.linear(x, w).unflatten(-1, (gates, 1, case.H)).transpose(0, 1)
        return flashrnn(wx, r, b, function=_FUNCTIONS[case.cell], backend=backend, dtype=dtype)

    def infer() -> Any:
        return forward(), ()

    def train() -> Any:
        states, last = forward()
        # states is [S, B, T, 1, H], the hidden state first; torch's upstream gradient is [T, B, H].
        output = states[0, :, :, 0].transpose(0, 1)
        return (states, last), torch.autograd.grad(output, (x, w, r, b), problem.cotangent)

    def collect(returned: Any) -> Outputs:
        (states, last), gradients = returned
        named = {"output": states[0, :, :, 0].transpose(0, 1), "h_n": last[0, :, :, 0].transpose(0, 1)}
        if case.has_cell_state:
            named["c_n"] = last[1, :, :, 0].transpose(0, 1)
        if gradients:
            recurrent = gradients[2][:, 0]
            # The GRU's recurrent gates come as n, r, z.
            recurrent = recurrent[[1, 2, 0]] if case.cell == "gru" else recurrent
            named["grad input"] = gradients[0]
            named["grad weight_ih_l0"] = gradients[1]
            named["grad weight_hh_l0"] = recurrent.flatten(0, 1)
        return named

    return Prepared(train if problem.training else infer, collect, (x, w, r, b))


def _recurrent_weights(case: Case, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """R and b in FlashRNN's layout.

    Its GRU has the recurrent gates n, r, z, and biases of n (the hidden one), r, z, n (the input one).
    """
    gates = GATES[case.cell]
    r = weights["weight_hh_l0"].view(gates, 1, case.H, case.H)
    bias_ih = weights["bias_ih_l0"].view(gates, 1, case.H)
    bias_hh = weights["bias_hh_l0"].view(gates, 1, case.H)
    if case.cell != "gru":
        return r, bias_ih + bias_hh
    both = bias_ih + bias_hh
    return r[[2, 0, 1]], torch.stack((bias_hh[2], both[0], both[1], bias_ih[2]))
