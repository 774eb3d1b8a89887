"""Typed calls of the registered operators, and what they return for tensors without data.

The only file that spells ``torch.ops``. The raw operators know no autograd: call them on tensors that require grad
and the gradient is silently lost, so everything but :mod:`fused_rnn.autograd` and the inference path of
:mod:`fused_rnn.functional` keeps away from them. ``csrc/ops/library.cpp`` documents the shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._extension import load

_C = load()  # the shared object registers the operators

#: Whether the operators were built for CUDA tensors too.
CUDA_KERNELS = bool(_C.cuda_archs())

_ops = torch.ops.fused_rnn
layer_forward = _ops.layer_forward.default
layer_backward = _ops.layer_backward.default
cell_forward = _ops.cell_forward.default
cell_backward = _ops.cell_backward.default


class CellTraits(NamedTuple):
    """What Python knows of a cell: the constants of its struct in csrc/cells."""

    gates: int
    saved: int
    cell_state: bool = False  # whether there is a c beside h


CELLS = {
    "rnn_tanh": CellTraits(gates=1, saved=0),
    "rnn_relu": CellTraits(gates=1, saved=0),
    "gru": CellTraits(gates=3, saved=4),
    "lstm": CellTraits(gates=4, saved=5, cell_state=True),
}

#: dtypes that the kernels take.
DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def _saved_dtype(input: torch.Tensor) -> torch.dtype:
    """The CPU computes and saves 16-bit types in float32; on the GPU, where memory is dear, they are saved as such."""
    return torch.float32 if input.element_size() == 2 and input.device.type != "cuda" else input.dtype


@torch.library.register_fake("fused_rnn::layer_forward")
def _(cell, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse, b_ih_reverse,
      b_hh_reverse, w_hr_reverse, save):  # fmt: skip
    traits = CELLS[cell]
    directions = 1 if w_ih_reverse is None else 2
    hidden = w_hh.size(0) // traits.gates
    rows = input.size(0) if batch_sizes is not None else input.size(0) * input.size(1)
    if batch_sizes is None:
        batch = input.size(1)
    else:  # batch_sizes[0] is data; hx tells the same number, where there is one
        batch = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.size(1)
    state = w_hh.size(1)
    saved = input.new_empty(
        (directions if save else 0, rows, traits.saved * hidden), dtype=_saved_dtype(input)
    )
    cn = input.new_empty((directions, batch, hidden) if CELLS[cell].cell_state else (0,))
    output = input.new_empty((*input.shape[:-1], directions * state))
    return output, input.new_empty((directions, batch, state)), cn, saved


@torch.library.register_fake("fused_rnn::layer_backward")
def _(cell, grad_output, grad_hn, grad_cn, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse,
      w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse, output, saved, needs):  # fmt: skip
    directions = 1 if w_ih_reverse is None else 2
    hidden = w_hh.size(0) // CELLS[cell].gates
    if batch_sizes is None:
        batch = output.size(1)
    else:
        states = [state for state in (h0, c0, grad_hn, grad_cn) if state is not None]
        batch = states[0].size(1) if states else torch.library.get_ctx().new_dynamic_size()
    sizes = [
        (*output.shape[:-1], w_ih.size(1)),
        (directions, batch, w_hh.size(1)),
        (directions, batch, hidden),
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
    return tuple(output.new_empty(size) if needs >> k & 1 else None for k, size in enumerate(sizes))


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
