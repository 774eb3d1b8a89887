"""A recurrent network as an ONNX model, made node by node from torch's weights. Needs numpy and onnx only.

ONNX orders the gates i, o, f, c (LSTM) and z, r, h (GRU) where torch has i, f, g, o and r, z, n, and its GRU
is torch's only with linear_before_reset=1 (the reset gate after the recurrent product, biases apart).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from fused_rnn_bench.case import Case
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray

# For each gate in ONNX's order, its place in torch's.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "rnn_relu": "RNN"}

# The oldest operator set with everything used here, so that engines of several years read it.
_OPSET = 17
_IR_VERSION = 8


def build_model(case: Case, weights: dict[str, Array]) -> bytes:
    """The serialized model. Inputs: x [T, B, I], lengths [B] if packed, h_0 (and c_0) [1, B, H] for cells.

    Outputs: output [T, B, D*H] (padded with zeros where a sequence has ended), h_n and c_n [L*D, B, H].
    """
    operator = _OPERATORS[case.cell.removesuffix("_cell")]
    directions = case.directions
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    inputs = [_tensor("x", (case.T, case.B, case.I))]
    lengths = ""
    if case.lengths != "dense":
        lengths = "lengths"
        inputs.append(_tensor(lengths, (case.B,), TensorProto.INT32))
    states = ["h", "c"] if operator == "LSTM" else ["h"]
    starts = ["", ""]
    if not case.is_layer:
        starts = [f"{state}_0" for state in states]
        inputs += [_tensor(name, (1, case.B, case.H)) for name in starts]

    below = "x"
    for layer in range(case.layers):
        names = [f"{kind}{layer}" for kind in "WRB"]
        for name, value in zip(names, _layer_weights(operator, case, weights, layer), strict=True):
            constants.append(numpy_helper.from_array(value, name))
        finals = [f"{state}_n{layer}" for state in states]
        attributes: dict[str, Any] = {"hidden_size": case.H}
        attributes["direction"] = "bidirectional" if case.bidirectional else "forward"
        if operator == "GRU":
            attributes["linear_before_reset"] = 1
        if operator == "RNN":
            attributes["activations"] = ["Relu" if case.cell == "rnn_relu" else "Tanh"] * directions
        wired = [below, *names, lengths, *starts[: len(states)]]
        nodes.append(helper.make_node(operator, wired, [f"Y{layer}", *finals], **attributes))
        above = "output" if layer == case.layers - 1 else f"x{layer + 1}"
        # Y is [T, D, B, H]; torch lays the directions side by side.
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"Z{layer}", "flat"], [above]))
        below = above
    constants.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), "flat"))
    for state in states:
        layers = [f"{state}_n{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Concat", layers, [f"{state}_n"], axis=0))

    outputs = [_tensor("output", (case.T, case.B, directions * case.H))]
    outputs += [_tensor(f"{state}_n", (case.layers * directions, case.B, case.H)) for state in states]
    graph = helper.make_graph(nodes, "network", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _tensor(name: str, shape: tuple[int, ...], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _layer_weights(operator: str, case: Case, weights: dict[str, Array], layer: int) -> list[Array]:
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] of one layer, in ONNX's gate order."""

    def ordered(name: str) -> Array:
        value = weights[name]
        gates = value.reshape(-1, case.H, *value.shape[1:])
        return gates[list(_GATES[operator])].reshape(value.shape)

    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: case.directions] if case.is_layer else [""]
    w = np.stack([ordered(f"weight_ih{suffix}") for suffix in suffixes])
    r = np.stack([ordered(f"weight_hh{suffix}") for suffix in suffixes])
    b = np.stack([np.concatenate([ordered(f"bias_ih{s}"), ordered(f"bias_hh{s}")]) for s in suffixes])
    return [w, r, b]
