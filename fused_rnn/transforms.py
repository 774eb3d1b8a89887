"""A layer whose derivatives are open: to be differentiated again, and to the transforms of ``torch.func``.

``vmap`` makes one call of one bigger batch: the mapped dimension is laid beside the rows of each step. So it does in
the backward pass (:mod:`fused_rnn.batching`). The second derivative has kernels of its own, for tensors on the CPU.
What is rarer (a third derivative, the second of each of many samples, tangents) takes :mod:`fused_rnn.reference`.

Functions with ``setup_context``, which the transforms ask for, and which cost twice a classic one: without transforms
the first derivative takes :mod:`fused_rnn.autograd`, the second a Function in C++ (csrc/ops/derivable.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from . import batching, ops, reference


def take(weights: Sequence[Tensor | None]) -> bool:
    """Whether the kernels serve a call under the transforms that are active now.

    They do not where each sample has weights of its own (an ensemble): there :mod:`fused_rnn.reference` makes one
    batched product a step. Nor for a transform that has no rule for a Function, or a vmap over no samples.
    """
    return all(map(_has_rule, torch._C._functorch.get_interpreter_stack() or ())) and not any(
        map(_is_mapped, weights)
    )


def _has_rule(level: torch._C._functorch.CInterpreter) -> bool:
    functorch = torch._C._functorch
    if level.key() == functorch.TransformType.Vmap:
        return functorch.CVmapInterpreterPtr(level).batchSize() > 0
    return level.key() == functorch.TransformType.Grad


def _is_mapped(tensor: Tensor | None) -> bool:
    functorch = torch._C._functorch
    while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


class Layer(Function):
    """One layer. Arguments as in ``autograd.Layer``, results as in ``ops.layer_forward``."""

    @staticmethod
    def forward(
        cell: str,
        batch_sizes: Tensor | None,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.layer_forward(cell, input, batch_sizes, h0, c0, *weights, True)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.cell, *tensors = inputs
        out, _, cn, saved = output
        ctx.save_for_backward(*tensors, out, saved)
        ctx.mark_non_differentiable(*([saved] if ops.CELLS[ctx.cell].cell_state else [cn, saved]))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, *arguments, output, saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *layer_gradients(ctx.cell, batch_sizes, wanted, gradients[:3], arguments, output, saved),
        )

    @staticmethod
    def vmap(info, in_dims: tuple, cell: str, batch_sizes: Tensor | None, *tensors: Tensor | None):
        batching.refuse_mapped_sizes(in_dims[1])
        count = info.batch_size
        rows = [batching.to_rows(t, dim, count) for t, dim in zip(tensors[:3], in_dims[2:5], strict=True)]
        output, hn, cn, saved = Layer.apply(cell, batching.grown(batch_sizes, count), *rows, *tensors[3:])
        has_c = ops.CELLS[cell].cell_state
        results = (
            batching.from_rows(output, count),
            batching.from_rows(hn, count),
            batching.from_rows(cn, count) if has_c else cn,
            batching.from_rows(saved, count),
        )
        return results, (output.dim() - 1, 2, 2 if has_c else None, 2)


def as_layer(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors of a cell's step as those of a layer of one step: what has rows gets a dimension in front."""
    return [None if t is None else t.unsqueeze(0) for t in tensors]


def layer_weights(weights: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """A cell's four weights as the ten of a layer."""
    return (*weights, *(None,) * (2 * reference.WEIGHTS_PER_DIRECTION - len(weights)))


def cell_step(
    cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """One time step; arguments and results as in ``reference.cell_step``."""
    _, hn, cn, _ = Layer.apply(cell, None, *as_layer((input, h0, c0)), *layer_weights(weights))
    return hn.squeeze(0), cn.squeeze(0) if ops.CELLS[cell].cell_state else None


class LayerBackward(Function):
    """The gradients of one layer's arguments, of one call or of many at once.

    Arguments: cell, batch sizes, which gradients are wanted, how many samples are mapped over (None: this is one
    call), which tensors have a part for each sample, in front; then the tensors: gradients of output, hn and cn, the
    layer's thirteen arguments, its output, what it saved. The last two count as constants: the derivatives of this
    Function are those of the whole pass, in the gradients and arguments. Results: the gradients of the thirteen, and
    for the second derivative, where that has kernels, the gradient of every state, a constant as well.
    """

    @staticmethod
    def forward(
        cell: str,
        batch_sizes: Tensor | None,
        wanted: tuple[bool, ...],
        samples: int | None,
        mapped: tuple[bool, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if samples is not None:
            return (*batching.gradients(cell, batch_sizes, wanted, samples, mapped, tensors), None)
        *gradients, input = tensors[:4]
        needs = ops.bits(wanted) | (ops.STATE_GRADIENTS if tensors[-2].is_cpu else 0)
        return ops.layer_backward(cell, *gradients, input, batch_sizes, *tensors[4:], needs)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        ctx.cell, batch_sizes, ctx.wanted, ctx.samples, ctx.mapped, *tensors = inputs
        dh = output[-1]
        ctx.save_for_backward(batch_sizes, *tensors, dh)
        if dh is not None:
            ctx.mark_non_differentiable(dh)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, *tensors, output, saved, dh = ctx.saved_tensors
        cotangents = cotangents[:-1]
        wanted = ctx.needs_input_grad[_TENSORS:-2]
        if all(v is None for v in cotangents):
            found = (None,) * len(tensors)
        else:
            found = second_derivative(
                ctx.cell, batch_sizes, wanted, tensors, cotangents, output, saved, dh, ctx.samples, ctx.mapped
            )
        return (None,) * _TENSORS + tuple(found) + (None, None)

    @staticmethod
    def vmap(
        info,
        in_dims: tuple,
        cell: str,
        batch_sizes: Tensor | None,
        wanted: tuple[bool, ...],
        samples: int | None,
        mapped: tuple[bool, ...],
        *tensors: Tensor | None,
    ):
        """A further mapped dimension is laid before the earlier one, and merged with it."""
        batching.refuse_mapped_sizes(in_dims[1])
        count, dims = info.batch_size, in_dims[_TENSORS:]
        now = tuple(before or dim is not None for before, dim in zip(mapped, dims, strict=True))

        def bring(tensor: Tensor | None, dim: int | None, before: bool) -> Tensor | None:
            if dim is not None:
                tensor = tensor.movedim(dim, 0)
            elif before:
                tensor = tensor.expand(count, *tensor.shape)
            else:
                return tensor
            if samples is None:
                return tensor
            if not before:
                tensor = tensor.unsqueeze(1).expand(count, samples, *tensor.shape[1:])
            return tensor.flatten(0, 1)

        brought = [bring(*one) for one in zip(tensors, dims, mapped, strict=True)]
        found = LayerBackward.apply(
            cell, batch_sizes, wanted, count * (1 if samples is None else samples), now, *brought
        )
        if samples is not None:
            found = tuple(None if g is None else g.unflatten(0, (count, samples)) for g in found)
        return found, tuple(None if g is None else 0 for g in found)


class LayerDoubleBackward(Function):
    """The derivative of LayerBackward of one call in a direction v: by the gradients it takes, then by the arguments.

    Arguments: cell, batch sizes, which of the 16 results are wanted; then the tensors: those of LayerBackward, with the
    thirteen v after the thirteen arguments, and its gradient of every state. None is no change.
    """

    @staticmethod
    def forward(
        cell: str, batch_sizes: Tensor | None, wanted: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, _, grad_cn, input, *others, dh = tensors
        *found, _ = ops.layer_double_backward(
            cell, dh, grad_cn, input, batch_sizes, *others, ops.bits(wanted)
        )
        return tuple(found)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        ctx.cell, batch_sizes, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(batch_sizes, *tensors[:-_CONSTANTS])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, *tensors = ctx.saved_tensors
        asked = [want and c is not None for want, c in zip(ctx.wanted, cotangents, strict=True)]
        found = reference.pull_back(
            reference.second_order(ctx.cell, batch_sizes, asked),
            tensors,
            ctx.needs_input_grad[3:-_CONSTANTS],
            tuple(c for c in cotangents if c is not None),
        )
        return (None, None, None, *found, *(None,) * _CONSTANTS)

    @staticmethod
    def vmap(
        info,
        in_dims: tuple,
        cell: str,
        batch_sizes: Tensor | None,
        wanted: tuple[bool, ...],
        *tensors: Tensor | None,
    ):
        batching.refuse_mapped_sizes(in_dims[1])
        compute = torch.vmap(reference.second_order(cell, batch_sizes, wanted), in_dims[3:-_CONSTANTS])
        found = iter(compute(*tensors[:-_CONSTANTS]))
        results = tuple(next(found) if want else None for want in wanted)
        return results, tuple(0 if want else None for want in wanted)


def second_derivative(
    cell: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    tensors: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    output: Tensor,
    saved: Tensor,
    dh: Tensor | None,
    samples: int | None = None,
    mapped: tuple[bool, ...] = (),
) -> Sequence[Tensor | None]:
    """The derivatives of <cotangents, LayerBackward> by its tensors but for the constants, where they are wanted."""
    if dh is not None and forward_ad._current_level < 0:
        return LayerDoubleBackward.apply(cell, batch_sizes, wanted, *tensors, *cotangents, output, saved, dh)
    gradients = reference.gradients(cell, batch_sizes, [v is not None for v in cotangents])
    if samples is not None:
        gradients = torch.vmap(gradients, tuple(0 if m else None for m in mapped[:-2]))
    return reference.pull_back(gradients, tensors, wanted, tuple(v for v in cotangents if v is not None))


_TENSORS = 5  # arguments of LayerBackward before its tensors
_CONSTANTS = 3  # the last arguments of LayerDoubleBackward: output, saved, dh


def layer_gradients(
    cell: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
    arguments: Sequence[Tensor | None],
    output: Tensor,
    saved: Tensor,
    link: Tensor | None = None,
) -> Sequence[Tensor | None]:
    """Gradients of a layer's thirteen arguments, themselves differentiable and open to every transform.

    ``link``: a result of the layer's Function that takes what their own derivative adds to its backward pass.
    """
    if all(g is None for g in gradients):
        return [None] * len(arguments)
    if forward_ad._current_level >= 0:
        compute = reference.gradients(cell, batch_sizes, wanted)
        found = iter(compute(*gradients, *arguments))
        return [next(found) if want else None for want in wanted]
    if not torch._C._are_functorch_transforms_active():
        return ops.derivable_gradients(cell, batch_sizes, wanted, gradients, arguments, output, saved, link)
    mapped = (False,) * (len(gradients) + len(arguments) + 2)
    *found, _ = LayerBackward.apply(
        cell, batch_sizes, tuple(wanted), None, mapped, *gradients, *arguments, output.detach(), saved
    )
    return found


def cell_gradients(
    cell: str,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
    arguments: Sequence[Tensor | None],
    h: Tensor,
    saved: Tensor,
) -> list[Tensor | None]:
    """Likewise of a cell's seven arguments."""
    with torch.enable_grad():  # they require grad as a layer's, too, whatever will be differentiated
        states = as_layer(arguments[:3])
    found = layer_gradients(
        cell,
        None,
        (*wanted, *(False,) * 6),
        (None, *as_layer(gradients)),
        (*states, *layer_weights(arguments[3:])),
        h.unsqueeze(0),
        saved,
    )
    return [None if g is None else g.squeeze(0) for g in found[:3]] + list(found[3:7])
