"""Typed calls of the registered operators, what they return for tensors without data, and their FLOPs.

The only file that spells ``torch.ops``. The raw operators know no autograd: call them on tensors that require grad
and the gradient is silently lost, so everything but :mod:`fused_rnn.autograd` and the inference path of
:mod:`fused_rnn.functional` keeps away from them. ``csrc/ops/library.cpp`` documents the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._extension import load
from ._version import __version__

_C = load()  # the shared object registers the operators

#: Whether the operators were built for CUDA tensors too.
CUDA_KERNELS = bool(_C.cuda_archs())

_ops = torch.ops.fused_rnn
layer_forward = _ops.layer_forward.default
layer_backward = _ops.layer_backward.default
layer_gate_gradients = _ops.layer_gate_gradients.default
layer_double_backward = _ops.layer_double_backward.default  # on the CPU
cell_forward = _ops.cell_forward.default
cell_backward = _ops.cell_backward.default

#: (cell, parameters by name, input, hx) -> h or (h, c): what `cell_forward` gives, past the dispatcher, in a tenth of
#: its time, with gradients if they are wanted. None where anything else has a say on that way (autocast, a transform,
#: a mode, a subclass, ...) or the input is not as it should be: csrc/ops/cell_call.cpp. Not for a graph: Dynamo cannot
#: see it.
cell_at_once = _C.cell_at_once
#: (module, input, hx) -> (output, hn) or (output, (hn, cn)): likewise.
layer_at_once = _C.layer_at_once
#: (cell, batch_sizes, wanted, gradients, arguments, output, saved, link) -> gradients of the arguments, to be
#: differentiated again; outside of transforms (csrc/ops/derivable.h).
derivable_gradients = _C.derivable_gradients
#: (*results) -> None; hooks on one of several results of a Function hear of its own gradient alone.
give_own_nodes = _C.give_own_nodes

# What torch.compile and torch.export see in place of the operators above: one call, whose path is chosen where it runs
# or is lowered. So Dynamo need not read our autograd Functions (it refuses a tensor passed in two places), and an
# exported program trains, moves to another device and is open to transforms. Lowered (by AOTAutograd,
# run_decompositions, AOTInductor), it is the operators above, which C++ knows too. `build` does nothing but stand
# there: what torch makes of a graph it keeps on disk, under the graph's own text, and another build lowers otherwise.
_traced = torch.library.Library("fused_rnn", "FRAGMENT")
_traced.define(
    "layer(str cell, str build, Tensor input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, "
    "Tensor? w_hr_reverse) -> (Tensor output, Tensor hn, Tensor cn)"
)
_traced.define(
    "cell_step(str cell, str build, Tensor input, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
    "Tensor? b_ih, Tensor? b_hh) -> (Tensor h, Tensor c)"
)
layer = _ops.layer.default
cell_step = _ops.cell_step.default
BUILD = f"{__version__}{'+cuda' if CUDA_KERNELS else ''}"


def define_traced(name: str, function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Says what `layer` or `cell_step` does; :mod:`fused_rnn.functional` knows, and calls this once. Out of sight
    of Dynamo: where a graph breaks at the operator, it would compile in pieces what is behind it, and warn."""
    _traced.impl(name, torch._disable_dynamo(function), "CompositeImplicitAutograd")


class CellTraits(NamedTuple):
    """What Python knows of a cell: the constants of its struct in csrc/cells."""

    gates: int
    saved: int
    gate_grads: int
    cell_state: bool = False  # whether there is a c beside h
    carry: bool = False  # whether the backward pass hands on a gradient beside that of h


CELLS = {
    "rnn_tanh": CellTraits(gates=1, saved=0, gate_grads=1),
    "rnn_relu": CellTraits(gates=1, saved=0, gate_grads=1),
    "gru": CellTraits(gates=3, saved=4, gate_grads=4, carry=True),
    "lstm": CellTraits(gates=4, saved=5, gate_grads=4, cell_state=True, carry=True),
}

#: dtypes that the kernels take.
DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


#: The bit of `needs` above those of the arguments: `layer_backward` gives the gradient of every h_t too. On the CPU.
STATE_GRADIENTS = 1 << 13
#: And: nobody reads `saved` again, so `layer_backward` may write over it.
SAVED_IS_SPENT = 1 << 14
#: The bit of `needs` above those of the results: `layer_double_backward` gives what it adds to a backward pass.
ADDS = 1 << 16


def adds_columns(traits: CellTraits, hidden_size: int, state_size: int) -> int:
    """Numbers of `adds` for each row (csrc/ops/gradients.h)."""
    return (traits.gate_grads + traits.carry) * hidden_size + state_size


def bits(wanted: Sequence[bool]) -> int:
    """What the backward operators take as `needs`."""
    result = 0
    for k, want in enumerate(wanted):
        result |= want << k
    return result


def _saved_dtype(input: Tensor) -> torch.dtype:
    """The CPU computes and saves 16-bit types in float32; on the GPU, where memory is dear, they are saved as such."""
    return torch.float32 if input.element_size() == 2 and input.device.type != "cuda" else input.dtype


def _batch(output: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor | None]):
    if batch_sizes is None:
        return output.size(1)
    states = [state for state in states if state is not None]
    # batch_sizes[0] is data; a state tells the same number, where there is one
    return states[0].size(1) if states else torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("fused_rnn::layer_forward")
def _(cell, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse, b_ih_reverse,
      b_hh_reverse, w_hr_reverse, save, reset=None):  # fmt: skip
    traits = CELLS[cell]
    directions = 1 if w_ih_reverse is None else 2
    hidden = w_hh.size(0) // traits.gates
    rows = input.size(0) if batch_sizes is not None else input.size(0) * input.size(1)
    batch = _batch(input, batch_sizes, (h0,))
    state = w_hh.size(1)
    saved = input.new_empty(
        (directions if save else 0, rows, traits.saved * hidden), dtype=_saved_dtype(input)
    )
    cn = input.new_empty((directions, batch, hidden) if CELLS[cell].cell_state else (0,))
    output = input.new_empty((*input.shape[:-1], directions * state))
    return output, input.new_empty((directions, batch, state)), cn, saved


@torch.library.register_fake("fused_rnn::layer_backward")
def _(cell, grad_output, grad_hn, grad_cn, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse,
      w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse, output, saved, needs, adds=None,
      reset=None):  # fmt: skip
    directions = 1 if w_ih_reverse is None else 2
    hidden = w_hh.size(0) // CELLS[cell].gates
    sizes = [
        (*output.shape[:-1], w_ih.size(1)),
        None if h0 is None else (directions, h0.size(1), w_hh.size(1)),
        None if c0 is None else (directions, c0.size(1), hidden),
    ]
    weights = [
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        w_ih_reverse,
        w_hh_reverse,
        b_ih_reverse,
        b_hh_reverse,
        w_hr_reverse,
    ]
    sizes += [None if w is None else w.shape for w in weights]
    found = [output.new_empty(size) if needs >> k & 1 else None for k, size in enumerate(sizes)]
    dh = None
    if needs & STATE_GRADIENTS:
        rows = math.prod(output.shape[:-1])  # its `numel` would fix the sizes of a graph
        dh = output.new_empty((directions, rows, w_hh.size(1)), dtype=_saved_dtype(output))
    return (*found, dh)


@torch.library.register_fake("fused_rnn::layer_gate_gradients")
def _(cell, grad_output, grad_hn, grad_cn, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse,
      w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse, output, saved, reset=None):  # fmt: skip
    directions, rows, _ = saved.shape
    traits = CELLS[cell]
    hidden = w_hh.size(0) // traits.gates
    batch = _batch(output, batch_sizes, (h0, c0, grad_hn, grad_cn))
    sizes = [
        (directions, rows, traits.gate_grads * hidden),
        (directions, rows, w_hh.size(1)),
        (directions, batch, w_hh.size(1)),
        (directions, batch, hidden) if traits.cell_state else (0,),
    ]
    return tuple(output.new_empty(size) for size in sizes)


@torch.library.register_fake("fused_rnn::layer_double_backward")
def _(cell, dh, grad_cn, input, batch_sizes, h0, c0, w_ih, w_hh, *tensors):
    *tensors, output, _, needs = tensors
    arguments = (input, h0, c0, w_ih, w_hh, *tensors[:8])
    directions, _, state = dh.shape
    batch = _batch(output, batch_sizes, (h0, c0, grad_cn))
    sizes = [
        output.shape,
        (directions, batch, state),
        (directions, batch, w_hh.size(0) // CELLS[cell].gates),
        *(None if t is None else t.shape for t in arguments),
    ]
    found = [output.new_empty(size) if needs >> k & 1 else None for k, size in enumerate(sizes)]
    adds = None
    if needs & ADDS:
        # Of the arguments' results only the products of a change with what stays as it is: the rest is in `adds`.
        v_input, v_w_ih = tensors[8], (tensors[11], tensors[16])
        of_direction = (v_input is not None, True, False, False, True)  # w_ih, w_hh, b_ih, b_hh, w_hr
        of_input = any(v is not None for v in v_w_ih)
        own = (True, True, True, of_input, False, False, *of_direction, *of_direction)
        found = [t if is_own else None for t, is_own in zip(found, own, strict=True)]
        columns = adds_columns(CELLS[cell], w_hh.size(0) // CELLS[cell].gates, state)
        adds = output.new_empty((directions, dh.size(1) * columns), dtype=dh.dtype)
    return (*found, adds)


@torch.library.register_fake("fused_rnn::cell_forward")
def _(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, save):
    traits = CELLS[cell]
    batch, hidden = input.size(0), w_hh.size(1)
    saved = input.new_empty((1 if save else 0, batch, traits.saved * hidden), dtype=_saved_dtype(input))
    return (
        input.new_empty((batch, hidden)),
        input.new_empty((batch, hidden) if CELLS[cell].cell_state else (0,)),
        saved,
    )


@torch.library.register_fake("fused_rnn::cell_backward")
def _(cell, grad_h, grad_c, input, h0, c0, w_ih, w_hh, b_ih, b_hh, h, saved, needs):
    sizes = [(h.size(0), w_ih.size(1)), h.shape, h.shape]
    sizes += [None if w is None else w.shape for w in (w_ih, w_hh, b_ih, b_hh)]
    return tuple(h.new_empty(size) if needs >> k & 1 else None for k, size in enumerate(sizes))


# FLOPs, for torch.utils.flop_counter: of the matrix products, as torch counts those of every operator.


def _products_forward(rows: int, weights: Sequence[Tensor | None]) -> int:
    """Of all rows with w_ih, w_hh and, if there is one, w_hr."""
    return sum(2 * rows * weight.numel() for weight in weights if weight is not None)


def _products_backward(
    rows: int, first_rows: int, w_ih: Tensor, w_hh: Tensor, w_hr: Tensor | None, needs: int, of_weights: int
) -> int:
    """Of one direction; ``of_weights`` are the bits of ``needs`` from this direction's w_ih on."""

    def wanted(bits: int, k: int) -> bool:
        return bool(bits >> k & 1)

    flops = 2 * rows * w_ih.numel() * (wanted(needs, 0) + wanted(of_weights, 0))
    flops += 2 * rows * w_hh.numel() * wanted(of_weights, 1)
    flops += (
        2 * (rows if wanted(needs, 1) else rows - first_rows) * w_hh.numel()
    )  # from a step to the one before
    if w_hr is not None:
        flops += 2 * rows * w_hr.numel() * (1 + wanted(of_weights, 4))
    return flops


def _first_rows(output: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor | None]) -> int:
    if batch_sizes is None:
        return output.size(1)
    # Without states 0: batch_sizes[0] is data, which the tensors of a graph do not have.
    return next((state.size(1) for state in states if state is not None), 0)


@register_flop_formula(_ops.layer_forward, get_raw=True)
def _(cell, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse, b_ih_reverse,
      b_hh_reverse, w_hr_reverse, save, reset=None, out_val=None) -> int:  # fmt: skip
    rows = input.shape[:-1].numel()
    return _products_forward(rows, (w_ih, w_hh, w_hr, w_ih_reverse, w_hh_reverse, w_hr_reverse))


@register_flop_formula(_ops.layer_backward, get_raw=True)
def _(cell, grad_output, grad_hn, grad_cn, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse,
      w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse, output, saved, needs, adds=None,
      reset=None, out_val=None) -> int:  # fmt: skip
    rows, first_rows = output.shape[:-1].numel(), _first_rows(output, batch_sizes, (h0, c0, grad_hn, grad_cn))
    flops = _products_backward(rows, first_rows, w_ih, w_hh, w_hr, needs, needs >> 3)
    if w_ih_reverse is not None:
        reverse = (w_ih_reverse, w_hh_reverse, w_hr_reverse)
        flops += _products_backward(rows, first_rows, *reverse, needs, needs >> 8)
    return flops


@register_flop_formula(_ops.layer_gate_gradients, get_raw=True)
def _(cell, grad_output, grad_hn, grad_cn, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse,
      w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse, output, saved, reset=None,
      out_val=None) -> int:  # fmt: skip
    return _products_forward(output.shape[:-1].numel(), (w_hh, w_hr, w_hh_reverse, w_hr_reverse))


@register_flop_formula(_ops.layer_double_backward, get_raw=True)
def _(cell, dh, grad_cn, input, batch_sizes, h0, c0, *tensors, out_val=None) -> int:
    *tensors, output, _, needs = tensors
    weights, (v_input, v_h0, v_c0, *changes) = tensors[:10], tensors[10:]
    states = (h0, c0, grad_cn, v_h0, v_c0)
    rows, first_rows = output.shape[:-1].numel(), _first_rows(output, batch_sizes, states)
    of_arguments = needs >> 3
    passes = 0 if needs & ADDS else 1  # backward, with the changes

    def rows_of_products(k: int) -> tuple[int, int, int]:
        """That meet w_ih, w_hh and w_hr, these first in ``weights[k:]``, or their changes."""
        v_ih, v_hh, *_, v_hr = (v is not None for v in changes[k : k + 5])
        d_input, d_h0, _, *wanted = (bool(of_arguments >> bit & 1) for bit in (0, 1, 2, 3 + k, 4 + k, 7 + k))
        d_ih, d_hh, d_hr = wanted
        changed_input = v_input is not None
        # the outputs' changes
        ih, hr = rows * (changed_input + v_ih), rows * (1 + v_hr)
        hh = rows * (1 + v_hh) - (0 if v_h0 is not None else first_rows)
        if of_arguments:  # what each step adds, with the weights' products of that; then the pass
            ih += rows * (d_input * (v_ih + passes) + d_ih * (changed_input + passes))
            hh += rows * v_hh + (rows if d_h0 else rows - first_rows) * passes + rows * d_hh * (1 + passes)
            hr += rows * (1 + v_hr + passes + d_hr * (1 + passes))
        return ih, hh, hr

    flops = 0
    for k in range(0, 10 if weights[5] is not None else 5, 5):
        by_weight = zip((weights[k], weights[k + 1], weights[k + 4]), rows_of_products(k), strict=True)
        flops += sum(2 * count * weight.numel() for weight, count in by_weight if weight is not None)
    return flops


@register_flop_formula(_ops.cell_forward, get_raw=True)
def _(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, save, out_val=None) -> int:
    return _products_forward(input.size(0), (w_ih, w_hh))


@register_flop_formula(_ops.cell_backward, get_raw=True)
def _(cell, grad_h, grad_c, input, h0, c0, w_ih, w_hh, b_ih, b_hh, h, saved, needs, out_val=None) -> int:
    return _products_backward(h.size(0), h.size(0), w_ih, w_hh, None, needs, needs >> 3)
