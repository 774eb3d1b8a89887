"""A layer as the transforms of ``torch.func`` see it: what ``grad``, ``vjp`` and ``vmap`` do to a call of the kernels.

``vmap`` makes one call of one bigger batch: the mapped dimension is laid beside the rows of each step. So it does in
the backward pass, unless each sample wants gradients of the weights for itself: those, and second derivatives, go
through :mod:`fused_rnn.reference`, whose operations are batched over the samples.

Functions with ``setup_context``, which the transforms ask for, and which cost twice a classic one: everything else
takes :mod:`fused_rnn.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from . import ops, reference


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


# ------------------------------------------------------------------------- the mapped dimension as more rows


def _to_rows(tensor: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """The mapped dimension beside the rows (last but one), and merged with them: row b of sample v is row b*V + v,
    so that the longest sequences stay first."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], count, tensor.size(-1))
    else:
        tensor = tensor.movedim(dim, -2)
    return tensor.flatten(-3, -2)


def _from_rows(tensor: Tensor, count: int) -> Tensor:
    """The samples in a dimension of their own again, last but one. Sizes are spelled out: there may be no rows."""
    *outer, rows, features = tensor.shape
    return tensor.view(*outer, rows // count, count, features)


def _grown(batch_sizes: Tensor | None, count: int) -> Tensor | None:
    return None if batch_sizes is None else batch_sizes * count


# ---------------------------------------------------------------------------------------------- the Functions


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
        _refuse_mapped_sizes(in_dims[1])
        count = info.batch_size
        rows = [_to_rows(t, dim, count) for t, dim in zip(tensors[:3], in_dims[2:5], strict=True)]
        output, hn, cn, saved = Layer.apply(cell, _grown(batch_sizes, count), *rows, *tensors[3:])
        has_c = ops.CELLS[cell].cell_state
        results = (
            _from_rows(output, count),
            _from_rows(hn, count),
            _from_rows(cn, count) if has_c else cn,
            _from_rows(saved, count),
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
    Function are those of the whole pass, in the gradients and arguments.
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
            return _gradients_of_samples(cell, batch_sizes, wanted, samples, mapped, tensors)
        *gradients, input = tensors[:4]
        return ops.layer_backward(cell, *gradients, input, batch_sizes, *tensors[4:], ops.bits(wanted))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        ctx.cell, batch_sizes, ctx.wanted, ctx.samples, ctx.mapped, *tensors = inputs
        ctx.save_for_backward(batch_sizes, *tensors[:-2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[_TENSORS : _TENSORS + len(tensors)]
        asked = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]

        def gradients_of_one(*sample: Tensor | None) -> tuple[Tensor | None, ...]:
            found = _reference_gradients(ctx.cell, batch_sizes, ctx.wanted, sample[:3], sample[3:])
            return tuple(found[k] for k in asked)

        gradients = gradients_of_one
        if ctx.samples is not None:
            in_dims = tuple(0 if mapped else None for mapped in ctx.mapped[: len(tensors)])
            gradients = torch.vmap(gradients_of_one, in_dims)
        found = _pull_back(gradients, tensors, wanted, tuple(cotangents[k] for k in asked))
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
        _refuse_mapped_sizes(in_dims[1])
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


_TENSORS = 5  # arguments of LayerBackward before its tensors
_WEIGHTS = 6  # tensors of LayerBackward before the weights


def layer_gradients(
    cell: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
    arguments: Sequence[Tensor | None],
    output: Tensor,
    saved: Tensor,
) -> Sequence[Tensor | None]:
    """Gradients of a layer's thirteen arguments, themselves differentiable and open to every transform."""
    if all(g is None for g in gradients):
        return [None] * len(arguments)
    if forward_ad._current_level >= 0:
        return _reference_gradients(cell, batch_sizes, wanted, gradients, arguments)
    mapped = (False,) * (len(gradients) + len(arguments) + 2)
    return LayerBackward.apply(
        cell, batch_sizes, tuple(wanted), None, mapped, *gradients, *arguments, output.detach(), saved
    )


def cell_gradients(
    cell: str,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
    arguments: Sequence[Tensor | None],
    h: Tensor,
    saved: Tensor,
) -> list[Tensor | None]:
    """Likewise of a cell's seven arguments."""
    found = layer_gradients(
        cell,
        None,
        (*wanted, *(False,) * 6),
        (None, *as_layer(gradients)),
        (*as_layer(arguments[:3]), *layer_weights(arguments[3:])),
        h.unsqueeze(0),
        saved,
    )
    return [None if g is None else g.squeeze(0) for g in found[:3]] + list(found[3:7])


def _pull_back(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[Tensor | None],
    wanted: Sequence[bool],
    cotangents: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Gradients of a function's arguments, by operations that every transform can look into."""
    chosen = [k for k, want in enumerate(wanted) if want and arguments[k] is not None]
    result: list[Tensor | None] = [None] * len(arguments)
    if not (chosen and cotangents):
        return result

    def of_chosen(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(arguments)
        for k, value in zip(chosen, values, strict=True):
            filled[k] = value
        return function(*filled)

    _, pull = torch.func.vjp(of_chosen, *(arguments[k] for k in chosen))
    for k, gradient in zip(chosen, pull(cotangents), strict=True):
        result[k] = gradient
    return result


def _reference_gradients(
    cell: str,
    batch_sizes: Tensor | None,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
    arguments: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """What :class:`LayerBackward` computes for one call, through :mod:`fused_rnn.reference`."""

    def layer(input: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        results = reference.layer(cell, input, batch_sizes, *others)
        return tuple(r for r, g in zip(results, gradients, strict=True) if g is not None)

    return _pull_back(layer, arguments, wanted, tuple(g for g in gradients if g is not None))


def _refuse_mapped_sizes(dim: int | None) -> None:
    if dim is not None:
        raise RuntimeError(
            "fused_rnn: vmap over batch_sizes is not possible: they are the shape of the batch"
        )


def _gradients_of_samples(
    cell: str,
    batch_sizes: Tensor | None,
    wanted: tuple[bool, ...],
    samples: int,
    mapped: tuple[bool, ...],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """LayerBackward.forward over several samples."""
    weights = slice(_WEIGHTS, -2)
    if samples == 0 or any(wanted[3:]) or any(mapped[weights]):

        def one(*sample: Tensor | None) -> tuple[Tensor, ...]:
            found = _reference_gradients(cell, batch_sizes, wanted, sample[:3], sample[3:-2])
            return tuple(g for g in found if g is not None)

        found = iter(torch.vmap(one, tuple(0 if m else None for m in mapped))(*tensors))
        return tuple(next(found) if want else None for want in wanted)

    *gradients, input, h0, c0, output, saved = (
        _to_rows(t, 0 if m else None, samples)
        for t, m in zip((*tensors[:6], *tensors[-2:]), (*mapped[:6], *mapped[-2:]), strict=True)
    )
    found = ops.layer_backward(
        cell, *gradients, input, _grown(batch_sizes, samples), h0, c0, *tensors[weights], output, saved,
        ops.bits(wanted),
    )  # fmt: skip
    return tuple(None if g is None else _from_rows(g, samples).movedim(-2, 0) for g in found)
