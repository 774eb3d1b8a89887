"""What ``vmap`` does to a layer: several calls with the same weights become one of a bigger batch.

The mapped dimension is laid beside the rows of each step. In the backward pass the kernels give the gates' gradients of
all samples at once, and each sample's own weight gradients are products of those, batched over the samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference

_WEIGHTS = 6  # tensors of transforms.LayerBackward before the weights


def to_rows(tensor: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """The mapped dimension beside the rows (last but one), and merged with them: row b of sample v is row b*V + v,
    so that the longest sequences stay first."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], count, tensor.size(-1))
    else:
        tensor = tensor.movedim(dim, -2)
    return tensor.flatten(-3, -2)


def from_rows(tensor: Tensor, count: int) -> Tensor:
    """The samples in a dimension of their own again, last but one. Sizes are spelled out: there may be no rows."""
    *outer, rows, features = tensor.shape
    return tensor.view(*outer, rows // count, count, features)


def grown(batch_sizes: Tensor | None, count: int) -> Tensor | None:
    return None if batch_sizes is None else batch_sizes * count


def refuse_mapped_sizes(dim: int | None) -> None:
    if dim is not None:
        raise RuntimeError(
            "fused_rnn: vmap over batch_sizes is not possible: they are the shape of the batch"
        )


def gradients(
    cell: str,
    batch_sizes: Tensor | None,
    wanted: tuple[bool, ...],
    samples: int,
    mapped: tuple[bool, ...],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """``transforms.LayerBackward`` over several samples: one call of the kernels, if all have the same weights."""
    weights = slice(_WEIGHTS, -2)
    of_weights = any(wanted[3:])
    projected = tensors[_WEIGHTS + 4] is not None
    if samples == 0 or any(mapped[weights]) or (of_weights and projected):
        compute = torch.vmap(
            reference.gradients(cell, batch_sizes, wanted), tuple(0 if m else None for m in mapped[:-2])
        )
        found = iter(compute(*tensors[:-2]))
        return tuple(next(found) if want else None for want in wanted)

    dtype = tensors[-2].dtype
    if of_weights and dtype.itemsize == 2:  # as inside the operators: nothing is rounded before it is summed
        tensors = [None if t is None else t.float() for t in tensors]
    *incoming, h0, c0, output, saved = (
        to_rows(tensors[k], 0 if mapped[k] else None, samples) for k in (0, 1, 2, 4, 5, -2, -1)
    )
    sizes = grown(batch_sizes, samples)
    if not of_weights:
        *found, _ = ops.layer_backward(
            cell, *incoming, None, sizes, h0, c0, *tensors[weights], output, saved, ops.bits(wanted)
        )
        return tuple(None if g is None else from_rows(g, samples).movedim(-2, 0) for g in found)

    dgates, previous, *dstates = ops.layer_gate_gradients(
        cell, *incoming, sizes, h0, c0, *tensors[weights], output, saved
    )
    x = tensors[3]
    if x is not None:  # one that the samples share stays one: it meets all of their gradients in one product
        x = x.flatten(1, -2).movedim(0, 1) if mapped[3] else x.flatten(0, -2)
    found = _products_of_samples(
        cell, wanted, tensors[weights], from_rows(dgates, samples), from_rows(previous, samples), x
    )
    if found[0] is not None:
        found[0] = found[0].unflatten(1, (*output.shape[:-2], output.size(-2) // samples))
    for k, state in enumerate(dstates, 1):
        found[k] = from_rows(state, samples).movedim(-2, 0) if wanted[k] else None
    return tuple(None if g is None else g.to(dtype) for g in found)


def _products_of_samples(
    cell: str,
    wanted: tuple[bool, ...],
    weights: Sequence[Tensor | None],
    dgates: Tensor,
    previous: Tensor,
    x: Tensor | None,
) -> list[Tensor | None]:
    """What ``csrc/ops/backward.cpp`` multiplies after its scan, for each sample: dgates and previous (D, N, V, ...),
    x (N, V, I) or (N, I). Gradients of states are left out."""
    result: list[Tensor | None] = [None] * len(wanted)
    for d, w_ih in enumerate((weights[0], weights[5])):
        if w_ih is None:
            break
        first, gates = 3 + 5 * d, w_ih.size(0)
        hidden = gates // ops.CELLS[cell].gates
        recurrent = of_input = dgates[d, ..., :gates]
        if dgates.size(-1) > gates:  # the GRU's last gate differs on its two sides: csrc/cells/gru.h
            of_input = torch.cat([recurrent[..., :-hidden], dgates[d, ..., -hidden:]], -1)
        if wanted[0]:
            dx = (of_input @ w_ih).movedim(1, 0)
            result[0] = dx if result[0] is None else result[0] + dx
        if wanted[first]:
            result[first] = torch.einsum("nvg,nvi->vgi" if x.dim() == 3 else "nvg,ni->vgi", of_input, x)
        if wanted[first + 1]:
            result[first + 1] = torch.einsum("nvg,nvh->vgh", recurrent, previous[d])
        for k, side in ((2, of_input), (3, recurrent)):
            result[first + k] = side.sum(0) if wanted[first + k] else None
    return result
