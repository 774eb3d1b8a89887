"""The autograd Functions: what the forward pass keeps, and what flows back.

The first derivative runs in the fused kernels. A backward pass that is itself recorded (``create_graph=True``), or
carries tangents of forward-mode, recomputes through :mod:`fused_rnn.reference` instead, whose operations autograd can
differentiate again, to any order; one under vmap goes through :mod:`fused_rnn.transforms`. Classic Functions
(``forward`` with ``ctx``): half the cost of a call of those with ``setup_context``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from . import ops, reference, transforms


def _looked_into() -> bool:
    """Whether the backward pass that runs now is itself being differentiated."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _open_gradients(
    compute: Callable[..., tuple[Tensor | None, ...]],
    arguments: Sequence[Tensor | None],
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``compute(*arguments)`` by operations that autograd can look into."""
    if arguments[0] is None:
        raise RuntimeError(_INPUT_IS_GONE)
    with torch.enable_grad():
        # Aliases: were one tensor passed in two places (tied weights, h0 is c0), its gradient would else count twice.
        aliases = [
            t.view_as(t) if want and t is not None else t for t, want in zip(arguments, wanted, strict=True)
        ]
        results = compute(*aliases)
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if r is not None and g is not None]
    inputs = [t for t, want in zip(aliases, wanted, strict=True) if want]
    if not pairs:
        return [None] * len(arguments)
    outputs, incoming = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(
            outputs, inputs, incoming, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
    )
    return [next(found) if want else None for want in wanted]


_INPUT_IS_GONE = (
    "fused_rnn: this backward pass was asked for a graph of its own (create_graph=True), which needs the layer's "
    "input. It was not kept, since neither the input nor weight_ih required grad. Let one of them require grad."
)


class Layer(Function):
    """One layer. Arguments: cell, batch_sizes, input, h0, c0, then ten weights as in ``reference.layer``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        cell: str,
        batch_sizes: Tensor | None,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, hn, cn, saved = ops.layer_forward(cell, input, batch_sizes, h0, c0, *weights, True)
        ctx.cell, ctx.batch_sizes = cell, batch_sizes
        wanted = ctx.needs_input_grad
        kept = input if wanted[2] or wanted[5] or wanted[10] else None  # of input, w_ih, w_ih_reverse
        ctx.save_for_backward(kept, h0, c0, *weights, output, saved)
        ctx.set_materialize_grads(False)
        return output, hn, cn if ops.CELLS[cell].cell_state else None

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, output, saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if gradients[0] is None and all(g is None for g in gradients):
            return (None,) * (2 + len(arguments))
        if _looked_into():

            def compute(input, h0, c0, *weights):
                return reference.layer(ctx.cell, input, ctx.batch_sizes, h0, c0, *weights)

            return None, None, *_open_gradients(compute, arguments, wanted, gradients)
        if torch._C._are_functorch_transforms_active():
            found = transforms.layer_gradients(
                ctx.cell, ctx.batch_sizes, wanted, gradients, arguments, output, saved
            )
            return None, None, *found
        input, *others = arguments
        found = ops.layer_backward(
            ctx.cell, *gradients, input, ctx.batch_sizes, *others, output, saved, ops.bits(wanted)
        )
        return None, None, *found


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

            def compute(*arguments):
                return reference.cell_step(ctx.cell, *arguments)

            return None, *_open_gradients(compute, arguments, wanted, gradients)
        if torch._C._are_functorch_transforms_active():
            found = transforms.cell_gradients(ctx.cell, wanted, gradients, arguments, h, saved)
            return None, *found
        return None, *ops.cell_backward(ctx.cell, *gradients, *arguments, h, saved, ops.bits(wanted))
