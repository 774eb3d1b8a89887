"""The autograd Functions: what the forward pass keeps, and what flows back.

The first derivative runs in the fused kernels. A backward pass that is itself recorded (``create_graph=True``), or
under a transform, takes :mod:`fused_rnn.transforms`, which calls kernels too. Classic Functions (``forward`` with
``ctx``): half the cost of a call of those with ``setup_context``. A plain call has the same in C++, at a third of the
cost (csrc/ops/recorded.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from . import ops, transforms


def _looked_into() -> bool:
    """Whether the backward pass that runs now is itself recorded, transformed, or carries tangents."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _read_once(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the backward pass that runs now is the only reader of what was saved, in one call of the operator with
    these tensors: the graph is not kept, and no mode, subclass or batch of gradients may make several calls of it."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(
            t is None or (type(t) in _PLAIN and not torch._C._functorch.is_legacy_batchedtensor(t))
            for t in tensors
        )
    )


def _link(cell: str, output: Tensor, dtype: torch.dtype, w_hh: Tensor) -> Tensor | None:
    """The last result of Layer: not a number of it is ever read, but its gradient carries what a second derivative adds
    to the backward pass (csrc/ops/derivable.h). None where there are no kernels for that, or no data."""
    if type(output) is not Tensor or not output.is_cpu or output.numel() == 0:
        return None
    traits, state = ops.CELLS[cell], w_hh.size(1)
    rows = output.shape[:-1].numel()
    size = (output.size(-1) // state, rows * ops.adds_columns(traits, w_hh.size(0) // traits.gates, state))
    if dtype != output.dtype:
        return torch.empty_strided(size, (0, 0), dtype=dtype)
    return output.detach().as_strided(size, (0, 0))  # memory that is there already


class Layer(Function):
    """One layer. Arguments: cell, batch_sizes, whether to recompute in backward what it would save, input, h0, c0, then
    ten weights as in ``reference.layer``. Results: output, hn, cn or None, a link or None."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        cell: str,
        batch_sizes: Tensor | None,
        recompute: bool,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        recompute = recompute and ops.CELLS[cell].saved > 0
        output, hn, cn, saved = ops.layer_forward(cell, input, batch_sizes, h0, c0, *weights, not recompute)
        ctx.cell, ctx.batch_sizes = cell, batch_sizes
        # Where as much is saved as the gates' gradients take, they may lie in its place, unless a hook has seen it.
        traits = ops.CELLS[cell]
        unseen = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        ctx.reuses_saved = traits.saved >= traits.gate_grads and unseen
        link = _link(cell, output, saved.dtype, weights[1]) if unseen else None
        wanted = ctx.needs_input_grad
        kept = (
            input if recompute or wanted[3] or wanted[6] or wanted[11] else None
        )  # of input, w_ih, w_ih_reverse
        ctx.save_for_backward(kept, h0, c0, *weights, output, None if recompute else saved, link)
        ctx.set_materialize_grads(False)
        return output, hn, cn if traits.cell_state else None, link

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, output, saved, link = ctx.saved_tensors
        *gradients, adds = gradients
        wanted = ctx.needs_input_grad[3:]
        if adds is None and gradients[0] is None and all(g is None for g in gradients):
            return (None,) * (3 + len(arguments))
        if saved is None:  # the same call gives the same bits
            *_, saved = ops.layer_forward(ctx.cell, arguments[0], ctx.batch_sizes, *arguments[1:], True)
        if _looked_into():
            assert adds is None  # comes from a pass without a graph, of which this one is a part
            kept = torch._C._autograd._get_current_graph_task_keep_graph()
            found = transforms.layer_gradients(
                ctx.cell, ctx.batch_sizes, wanted, gradients, arguments, output, saved, link if kept else None
            )
            return None, None, None, *found
        input, *others = arguments
        needs = ops.bits(wanted)
        if ctx.reuses_saved and _read_once((*gradients, *arguments, output, saved)):
            needs |= ops.SAVED_IS_SPENT
            ctx.maybe_clear_saved_tensors()  # whatever happens from here on, no second pass may read it
        *found, _ = ops.layer_backward(
            ctx.cell, *gradients, input, ctx.batch_sizes, *others, output, saved, needs, adds
        )
        return None, None, None, *found


class Cell(Function):
    """One time step. Arguments: cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        cell: str,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        h, c, saved = ops.cell_forward(cell, input, h0, c0, *weights, True)
        ctx.cell = cell
        wanted = ctx.needs_input_grad
        kept = input if wanted[1] or wanted[4] else None  # of input, w_ih
        ctx.save_for_backward(kept, h0, c0, *weights, h, saved)
        ctx.set_materialize_grads(False)
        return h, c if ops.CELLS[cell].cell_state else None

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, h, saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if gradients[0] is None and all(g is None for g in gradients):
            return (None,) * (1 + len(arguments))
        if _looked_into():
            found = transforms.cell_gradients(ctx.cell, wanted, gradients, arguments, h, saved)
            return None, *found
        return None, *ops.cell_backward(ctx.cell, *gradients, *arguments, h, saved, ops.bits(wanted))
