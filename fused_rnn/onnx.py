"""Export to ONNX: our layers and cells as the standard nodes ``LSTM``, ``GRU`` and ``RNN``.

::

    import fused_rnn.onnx

    torch.onnx.export(model, (x,), "model.onnx", dynamo=True, custom_translation_table=fused_rnn.onnx.translations())

Needs ``onnxscript``, as ``torch.onnx.export`` itself does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import ops

# Where ONNX keeps its gates, in numbers of torch's: i, f, g, o -> i, o, f, g;  r, z, n -> z, r, n.
_GATE_ORDER = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}

_PACKED = (
    "a layer that takes a PackedSequence has no ONNX equivalent: export one that takes the padded batch, and leave "
    "what lies past the end of a sequence out of account"
)
_PROJECTED = "an LSTM with proj_size has no ONNX equivalent: the LSTM node has no projection"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)`` for our layers and cells.

    The number of steps and the batch size may be dynamic. A packed input and ``proj_size`` raise NotImplementedError
    during the export.

    Raises:
        ImportError: ``onnxscript`` is not installed.
    """
    _opset()  # a missing package is told of here, in plain words
    return {ops.layer: _layer, ops.cell_step: _cell_step}


def _opset() -> Any:
    """The opset that torch.onnx's own translations are written in; it converts them to others."""
    from onnxscript import opset18

    return opset18


# The translations. Arguments are those of the operators, as ONNX values; the exporter takes an argument for an
# attribute where it is annotated with a type of Python's, and for a tensor where it is not.


def _layer(cell: str, build: str, input, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse,
          w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse):  # fmt: skip
    """fused_rnn::layer: output (T, B, D*H), hn and cn (D, B, H)."""
    if batch_sizes is not None:
        raise NotImplementedError(f"fused_rnn.onnx: {_PACKED}")
    if w_hr is not None:
        raise NotImplementedError(f"fused_rnn.onnx: {_PROJECTED}")
    op = _opset()
    directions = [(w_ih, w_hh, b_ih, b_hh)]
    if w_ih_reverse is not None:
        directions.append((w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse))
    output, hn, cn = _recurrent(op, cell, input, h0, c0, directions)  # output (T, D, B, H)
    output = op.Transpose(output, perm=[0, 2, 1, 3])
    return op.Reshape(output, op.Constant(value_ints=[0, 0, -1])), hn, cn


def _cell_step(cell: str, build: str, input, h0, c0, w_ih, w_hh, b_ih, b_hh):
    """fused_rnn::cell_step: a layer of one step; h and c (B, H)."""
    op = _opset()
    axis = op.Constant(value_ints=[0])
    input, h0, c0 = (None if t is None else op.Unsqueeze(t, axis) for t in (input, h0, c0))
    _, hn, cn = _recurrent(op, cell, input, h0, c0, [(w_ih, w_hh, b_ih, b_hh)])
    return op.Squeeze(hn, axis), op.Squeeze(cn, axis) if ops.CELLS[cell].cell_state else cn


def _recurrent(op: Any, cell: str, input, h0, c0, directions: list):
    w_ih, w_hh, b_ih, b_hh = zip(*directions, strict=True)
    weights = [_stacked(op, cell, w_ih), _stacked(op, cell, w_hh)]
    biases = None
    if b_ih[0] is not None:
        biases = op.Concat(_stacked(op, cell, b_ih), _stacked(op, cell, b_hh), axis=1)
    options: dict[str, Any] = {
        "hidden_size": w_hh[0].shape[1],
        "direction": "bidirectional" if len(directions) == 2 else "forward",
    }
    # No sequence lengths: every sequence is T long.
    if cell == "lstm":
        return op.LSTM(input, *weights, biases, None, h0, c0, **options)
    if cell == "gru":
        output, hn = op.GRU(input, *weights, biases, None, h0, linear_before_reset=1, **options)
    else:
        activation = "Tanh" if cell == "rnn_tanh" else "Relu"
        options["activations"] = [activation] * len(directions)
        output, hn = op.RNN(input, *weights, biases, None, h0, **options)
    return output, hn, op.Identity(hn)  # in the place of cn, which nobody reads


def _stacked(op: Any, cell: str, tensors: tuple):
    """One weight or bias of every direction, (D, G*H, ...), its gates in ONNX's order."""
    axis = op.Constant(value_ints=[0])
    return _joined(op, [op.Unsqueeze(_reordered(op, cell, tensor), axis) for tensor in tensors])


def _reordered(op: Any, cell: str, tensor):
    order = _GATE_ORDER[cell]
    if len(order) == 1:
        return tensor
    hidden = tensor.shape[0] // len(order)
    rows = [gate * hidden + unit for gate in order for unit in range(hidden)]
    return op.Gather(tensor, op.Constant(value_ints=rows), axis=0)


def _joined(op: Any, tensors: list):
    return tensors[0] if len(tensors) == 1 else op.Concat(*tensors, axis=0)
