"""What other ways to write a model down are told: TorchScript compiles no layer of ours, nor does the ONNX exporter
built on it, and ``revert`` gives both what they know; to ``torch.fx`` a layer is one node, as torch.nn's are."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy


def refuse(module: nn.Module) -> NoReturn:
    """The hook by which torch.jit.script asks a module, before anything else, for one that it can compile.

    It puts the answer in the module's place for good. A layer of torch.nn's with the same weights would do, but the
    model would then hold that one after, and nobody asked for it.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile fused_rnn.{type(module).__name__}. Script a copy of the model with layers of "
        "torch.nn's, which have the same weights: torch.jit.script(fused_rnn.revert(copy.deepcopy(model))). "
        "torch.compile and torch.export take the model as it is."
    )


def node_of_call(module: nn.Module, input: Any, hx: Any) -> Proxy | None:
    """The call as a node of the graph that ``torch.fx.symbolic_trace`` makes, or None where nobody traces.

    A tracer takes a class of torch.nn for a leaf by where it is defined, and would go into one of ours, whose way
    depends on its input.

    Raises:
        RuntimeError: it is not fx that traces, but the ONNX exporter of ``dynamo=False``.
    """
    if torch._C._is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"torch.onnx.export(..., dynamo=False) knows no fused_rnn.{type(module).__name__}. Export a copy of the "
            "model with layers of torch.nn's: fused_rnn.revert(copy.deepcopy(model)); or this one with "
            "dynamo=True, custom_translation_table=fused_rnn.onnx.translations()."
        )
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    traced = next((given for given in (input, *states) if isinstance(given, Proxy)), None)
    if traced is None or traced.tracer.root is module:  # the root has no name
        return None
    arguments = (input,) if hx is None else (input, hx)
    return traced.tracer.create_proxy("call_module", traced.tracer.path_of_module(module), arguments, {})
