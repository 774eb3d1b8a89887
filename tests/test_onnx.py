"""Export to ONNX: one standard node a layer, and the numbers of ONNX Runtime at lengths not seen at export."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from parity import (
    CELLS,
    GRU,
    KINDS,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    RNN_RELU,
    Kind,
    make_input,
    make_state,
    make_twins,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
import fused_rnn.onnx

NEEDS = (
    "needs onnx, onnxscript and onnxruntime, which requirements.txt has for Pythons that they are built for"
)
onnx = pytest.importorskip("onnx", reason=NEEDS)
pytest.importorskip("onnxscript", reason=NEEDS)
onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS)

# torch's own remarks, about itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes? self"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:# ONNX model has different number of inputs"),
]

LAYERS = [kind for kind in KINDS if not kind.is_cell and kind is not LSTM_PROJ]
DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
SIZES = [(4, 3), (7, 2), (5, 1), (1, 6), (40, 9)]  # T and B; the first is the one at export


def export(module: nn.Module, arguments: tuple, dynamic_shapes: tuple):
    return torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        verbose=False,
        dynamic_shapes=dynamic_shapes,
        custom_translation_table=fused_rnn.onnx.translations(),
    )


def shapes_of(module: nn.Module, with_hx: bool) -> tuple:
    """The dynamic dimensions of input and hx."""
    if isinstance(module, nn.RNNCellBase):
        input, state = {0: "batch"}, {0: "batch"}
    else:
        input = {0: "batch", 1: "steps"} if module.batch_first else {0: "steps", 1: "batch"}
        state = {1: "batch"}
    if not with_hx:
        return (input, None)
    is_lstm = isinstance(module, (fused_rnn.LSTM, fused_rnn.LSTMCell))
    return (input, (state, state) if is_lstm else state)


class Runtime:
    """The model in ONNX Runtime, called as the module is; a flat list of tensors comes back."""

    def __init__(self, program) -> None:
        onnx.checker.check_model(program.model_proto)
        self.graph = program.model_proto.graph
        self.session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def __call__(self, *arguments) -> list[Tensor]:
        given = [tensor for argument in arguments if argument is not None for tensor in tensors_of(argument)]
        names = [input.name for input in self.session.get_inputs()]
        results = self.session.run(
            None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        )
        return [torch.from_numpy(result) for result in results]

    @property
    def nodes(self) -> list[str]:
        return [node.op_type for node in self.graph.node]

    def attributes(self, of: str) -> dict:
        (node,) = (node for node in self.graph.node if node.op_type == of)
        return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def assert_same_numbers(kind: Kind, with_hx: bool = True, **options) -> Runtime:
    """In ONNX Runtime and here, at every size, of a program exported at one of them."""
    ours = make_twins(kind, **options).ours.eval()
    sample = (make_input(ours, *SIZES[0]), make_state(ours, SIZES[0][1]) if with_hx else None)
    runtime = Runtime(export(ours, sample, shapes_of(ours, with_hx)))
    for steps, batch in SIZES:
        x, hx = make_input(ours, steps, batch), make_state(ours, batch) if with_hx else None
        with torch.no_grad():
            torch.testing.assert_close(runtime(x, hx), tensors_of(ours(x, hx)))
    return runtime


@pytest.mark.parametrize(
    "kind, with_hx", [(kind, False) for kind in LAYERS] + [(LSTM, True), (GRU, True)], ids=str
)
def test_layers(kind: Kind, with_hx: bool):
    runtime = assert_same_numbers(kind, with_hx)
    assert runtime.nodes == [kind.cls, "Transpose", "Reshape"], (
        "one node, and its output laid out as torch does"
    )


@pytest.mark.parametrize("kind, with_hx", [(kind, True) for kind in CELLS] + [(LSTM_CELL, False)], ids=str)
def test_cells(kind: Kind, with_hx: bool):
    runtime = assert_same_numbers(kind, with_hx)
    assert runtime.nodes.count(kind.cls.removesuffix("Cell")) == 1
    assert set(runtime.nodes) == {kind.cls.removesuffix("Cell"), "Unsqueeze", "Squeeze"}


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_deep_layers(kind: Kind):
    runtime = assert_same_numbers(kind, **DEEP)
    assert runtime.nodes.count(kind.cls) == 2


@pytest.mark.parametrize("kind", [GRU, LSTM_CELL, RNN_RELU], ids=str)
def test_without_bias(kind: Kind):
    assert_same_numbers(kind, bias=False)


def test_weights_of_any_size():
    """The exporter folds small constants only; larger weights are put in order by ONNX Runtime."""
    assert_same_numbers(LSTM, False, input_size=70, hidden_size=130, bidirectional=True)


def test_attributes():
    """What ONNX leaves to choose, as torch does it."""
    found = assert_same_numbers(GRU).attributes("GRU")
    assert found == {"hidden_size": 7, "direction": b"forward", "linear_before_reset": 1, "layout": 0}
    found = assert_same_numbers(RNN_RELU, bidirectional=True).attributes("RNN")
    both = [b"Relu", b"Relu"]
    assert found == {"hidden_size": 7, "direction": b"bidirectional", "activations": both, "layout": 0}


class Tagger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(11, 5), layer, nn.Linear(14, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(self.embed(words))[0])).log_softmax(-1)


def test_a_model_from_a_file(tmp_path):
    """Converted from torch.nn's layers, exported to a file, run by ONNX Runtime from there."""
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(5, 7, **DEEP)).eval()
    original = copy.deepcopy(model)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        fused_rnn.convert(model),
        (torch.randint(11, (3, 4)),),
        str(path),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "batch", 1: "steps"},),
        custom_translation_table=fused_rnn.onnx.translations(),
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in [(3, 4), (2, 19), (1, 1)]:
        words = torch.randint(11, shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: words.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), original(words))


# --------------------------------------------------------------------------------------------- what ONNX cannot say


def causes(error: BaseException) -> Sequence[BaseException]:
    found = [error]
    while (error := error.__cause__) is not None:
        found.append(error)
    return found


def assert_refused(words: str, module: nn.Module, *arguments) -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=words) as caught:
        export(module, arguments, None)
    assert any(isinstance(cause, NotImplementedError) for cause in causes(caught.value))


def test_a_projection_is_refused():
    ours = make_twins(LSTM_PROJ).ours.eval()
    assert_refused("proj_size has no ONNX equivalent", ours, make_input(ours))


def test_packed_input_is_refused():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_twins(GRU).ours

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            return self.layer(PackedSequence(data, batch_sizes))[0].data

    words = "PackedSequence has no ONNX equivalent: export one that takes the padded batch"
    assert_refused(words, Rows().eval(), torch.randn(6, 5), torch.tensor([3, 2, 1]))


@pytest.mark.parametrize("kind", [LSTM, LSTM_CELL], ids=str)
def test_without_our_table_the_operator_is_named(kind: Kind):
    ours = make_twins(kind).ours.eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"fused_rnn\.(layer|cell)_forward"):
        torch.onnx.export(ours, (make_input(ours),), dynamo=True, verbose=False)
