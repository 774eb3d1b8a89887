"""The stack: layers, directions, dropout and autocast around one layer's computation, and the choice of its path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, ops, reference, transforms

#: h0 or (h0, c0); each (layers * directions, batch, size).
States = tuple[Tensor, ...]


# plain PyTorch; kernels alone; kernels with autograd; kernels under transforms of torch.func
_REFERENCE, _PLAIN, _RECORDED, _TRANSFORMED = range(4)


_STATES = 3  # tensors before the weights: input, h0, c0


def _path(tensors: Sequence[Tensor | None]) -> int:
    """How to compute on these tensors: input, h0, c0, then weights. The input is never None.

    What the kernels do not take goes through :mod:`fused_rnn.reference`: other devices, dtypes and layouts (a sparse
    matrix is multiplied as in torch.nn); mixtures, for which it raises torch's own errors; forward-mode derivatives
    and transforms without a rule for a Function, which look inside its operations.
    """
    first = tensors[0]
    dtype, on_cpu = first.dtype, first.is_cpu
    device = (
        None if on_cpu else first.device
    )  # is_cpu is the cheaper question, and a cell's call asks ten times
    if not (on_cpu or (first.is_cuda and ops.CUDA_KERNELS)):
        return _REFERENCE
    records = False
    for tensor in tensors:
        if tensor is not None:
            if not (tensor.dtype is dtype and (tensor.is_cpu if on_cpu else tensor.device == device)):
                return _REFERENCE
            if tensor.layout is not torch.strided:
                return _REFERENCE
            records = records or tensor.requires_grad
    if dtype not in ops.DTYPES or forward_ad._current_level >= 0:
        return _REFERENCE
    if torch._C._are_functorch_transforms_active():
        kernels = not torch.compiler.is_compiling() and transforms.take(tensors[_STATES:])
        return _TRANSFORMED if kernels else _REFERENCE
    return _RECORDED if records and torch.is_grad_enabled() else _PLAIN


def _written_down(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a graph is being made that shall hold the call as one operator whose path is chosen where it runs.

    torch.jit.trace cannot keep an autograd Function. Grad mode must not matter, for it traces twice, the second time
    without, and compares. What needs no gradients it holds as the kernels' operators, which C++ knows too.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    return torch._C._is_tracing() and any(t is not None and t.requires_grad for t in tensors)


def layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer by the fastest path that can take it; arguments and results as in ``reference.layer``."""
    if _written_down((input, h0, c0, *weights)):
        output, hn, cn = ops.layer(cell, ops.BUILD, input, batch_sizes, h0, c0, *weights)
        return output, hn, cn if ops.CELLS[cell].cell_state else None
    return _computed_layer(cell, input, batch_sizes, h0, c0, *weights, recompute=recompute)


def _computed_layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *weights: Tensor | None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    path = _path((input, h0, c0, *weights))
    if path == _REFERENCE:
        return reference.layer(cell, input, batch_sizes, h0, c0, *weights)
    if path == _RECORDED:
        output, hn, cn, _ = autograd.Layer.apply(cell, batch_sizes, recompute, input, h0, c0, *weights)
        ops.give_own_nodes(output, hn, cn)
        return output, hn, cn
    if path == _TRANSFORMED:
        output, hn, cn, _ = transforms.Layer.apply(cell, batch_sizes, input, h0, c0, *weights)
    else:
        output, hn, cn, _ = ops.layer_forward(cell, input, batch_sizes, h0, c0, *weights, False)
    return output, hn, cn if ops.CELLS[cell].cell_state else None


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = device.type  # a device without autocast, such as meta, may not even be asked whether it is on
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast does it: double precision is left alone."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _state_dtype(autocast: torch.dtype, device: torch.device, state: Tensor) -> torch.dtype:
    """The dtype that a state has under autocast where torch.nn composes it of pointwise operations.

    On the CPU those promote, so a float32 state stays float32 (``state`` is hx or, without one, the input). On CUDA
    torch casts the whole recurrence. Double precision takes no part in autocast: beside it nothing promotes.
    """
    if device.type != "cpu" or state.dtype == torch.float64:
        return autocast
    return torch.promote_types(autocast, state.dtype)


def cell_step(
    cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """One time step of a batch; arguments and results as in ``reference.cell_step``."""
    autocast = _autocast_dtype(input.device)
    if autocast is not None:
        keeps_state = cell in ("gru", "lstm")
        dtype = _state_dtype(autocast, input.device, input if h0 is None else h0) if keeps_state else autocast
        input, h0, c0, *weights = (_cast(t, dtype) for t in (input, h0, c0, *weights))
        with torch.autocast(input.device.type, enabled=False):
            return _cell_step(cell, input, h0, c0, weights)
    return _cell_step(cell, input, h0, c0, weights)


def _cell_step(
    cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    if _written_down((input, h0, c0, *weights)):
        h, c = ops.cell_step(cell, ops.BUILD, input, h0, c0, *weights)
        return h, c if ops.CELLS[cell].cell_state else None
    return _computed_step(cell, input, h0, c0, *weights)


def _computed_step(
    cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    path = _path((input, h0, c0, *weights))
    if path == _REFERENCE:
        return reference.cell_step(cell, input, h0, c0, *weights)
    if path == _RECORDED:
        h, c = autograd.Cell.apply(cell, input, h0, c0, *weights)
        if c is not None:
            ops.give_own_nodes(h, c)
        return h, c
    if path == _TRANSFORMED:
        return transforms.cell_step(cell, input, h0, c0, weights)
    h, c, _ = ops.cell_forward(cell, input, h0, c0, *weights, False)
    return h, c if ops.CELLS[cell].cell_state else None


def _traced_layer(
    cell: str,
    build: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Under a transform the dispatcher is past the point where it could take a Function.
    transformed = torch._C._are_functorch_transforms_active()
    compute = reference.layer if transformed else _computed_layer
    output, hn, cn = compute(cell, input, batch_sizes, h0, c0, *weights)
    return output, hn, input.new_empty(0) if cn is None else cn


def _traced_step(
    cell: str, build: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    compute = reference.cell_step if torch._C._are_functorch_transforms_active() else _computed_step
    h, c = compute(cell, input, h0, c0, *weights)
    return h, input.new_empty(0) if c is None else c


ops.define_traced("layer", _traced_layer)
ops.define_traced("cell_step", _traced_step)


def split_weights(
    flat: Sequence[Tensor], num_layers: int, directions: int, bias: bool, projected: bool
) -> list[tuple[Tensor | None, ...]]:
    """torch's flat list of a module's weights as ten a layer, None where there is no such weight."""
    size = 2 + 2 * bias + projected
    absent = (None,) * reference.WEIGHTS_PER_DIRECTION

    def direction(start: int) -> tuple[Tensor | None, ...]:
        w_ih, w_hh, *rest = flat[start : start + size]
        b_ih, b_hh = rest[:2] if bias else (None, None)
        return w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None

    layers = []
    for first in range(0, num_layers * directions * size, directions * size):
        layers.append(direction(first) + (direction(first + size) if directions == 2 else absent))
    return layers


def stack(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: States | None,
    layers: Sequence[Sequence[Tensor | None]],
    dropout: float,
    recompute: bool = False,
) -> tuple[Tensor, States]:
    """Layers one on top of the other.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: (T, B, I), or packed rows (N, I) with ``batch_sizes`` (int64 (T,) on the CPU, not increasing).
        states: h0, and c0 for the LSTM, each (layers * directions, B, size); None means zero.
        layers: the weights of each layer, from :func:`split_weights`.
        dropout: probability with which outputs of every layer but the last are zeroed; 0 when not training.
        recompute: whether the backward pass computes the gates once more, in place of keeping them.

    Returns:
        The last layer's output, and the final states in the form of ``states``.
    """
    autocast = _autocast_dtype(input.device)
    if autocast is None:
        return _stack(cell, input, batch_sizes, states, layers, dropout, recompute)
    projected = layers[0][4] is not None
    # Where torch.nn runs a fused kernel (padded LSTM), or ends a step in a matrix product, autocast's dtype wins.
    all_low = cell in ("rnn_tanh", "rnn_relu") or (cell == "lstm" and batch_sizes is None and not projected)
    state_dtype = _state_dtype(autocast, input.device, input if states is None else states[0])
    dtype = autocast if all_low else state_dtype
    given = [_cast(input, dtype), *(_cast(state, dtype) for state in states or ())]
    layers = [[_cast(weight, dtype) for weight in weights] for weights in layers]
    with torch.autocast(input.device.type, enabled=False):
        output, finals = _stack(
            cell, given[0], batch_sizes, tuple(given[1:]) or None, layers, dropout, recompute
        )
    if projected:
        output, finals = _cast(output, autocast), (_cast(finals[0], autocast), finals[1])
    return output, finals


def _stack(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: States | None,
    layers: Sequence[Sequence[Tensor | None]],
    dropout: float,
    recompute: bool = False,
) -> tuple[Tensor, States]:
    h0, c0 = (*(states or ()), None, None)[:2]
    if len(layers) == 1:
        output, hn, cn = layer(cell, input, batch_sizes, h0, c0, layers[0], recompute)
        return output, (hn,) if cn is None else (hn, cn)

    directions = 1 if layers[0][reference.WEIGHTS_PER_DIRECTION] is None else 2
    last_h, last_c = [], []
    for k, weights in enumerate(layers):
        first = k * directions
        h = None if h0 is None else h0.narrow(0, first, directions)
        c = None if c0 is None else c0.narrow(0, first, directions)
        input, hn, cn = layer(cell, input, batch_sizes, h, c, weights, recompute)
        last_h.append(hn)
        last_c.append(cn)
        if dropout > 0 and k < len(layers) - 1:
            input = torch.dropout(input, dropout, True)
    return input, (torch.cat(last_h),) if not ops.CELLS[cell].cell_state else (
        torch.cat(last_h),
        torch.cat(last_c),
    )
