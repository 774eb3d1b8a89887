"""torch.jit.trace: a call is one operator of the trace, which goes through a file, takes other sizes and trains. The
old ONNX exporter, built on it, is refused with the way out."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from parity import (
    CLASSES,
    GRU,
    GRU_CELL,
    KINDS,
    LAYERS,
    LSTM,
    Kind,
    make_input,
    make_state,
    make_twins,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn

# torch's own remarks, about itself, and about sizes that are compared while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
]

DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def through_a_file(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_same(found, expected) -> None:
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad


def assert_same_gradients(traced: torch.jit.ScriptModule, module: nn.Module, *inputs) -> None:
    """By weights and inputs; a trace lists its parameters under their names, in an order of its own."""
    names, of_ours = zip(*module.named_parameters(), strict=True)
    its = dict(traced.named_parameters())
    leaves = [leaf.requires_grad_() for leaf in tensors_of(inputs)]
    found = sum(out.sin().sum() for out in tensors_of(traced(*inputs)))
    expected = sum(out.sin().sum() for out in tensors_of(module(*inputs)))
    for a, b in zip(
        torch.autograd.grad(found, [*leaves, *(its[name] for name in names)]),
        torch.autograd.grad(expected, [*leaves, *of_ours]),
        strict=True,
    ):
        assert torch.equal(a, b)


def arguments(module: nn.Module, steps: int, batch: int, with_hx: bool) -> tuple:
    x = make_input(module, steps, batch)
    return (x, make_state(module, batch)) if with_hx else (x,)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_trains_and_takes_other_sizes(kind: Kind, with_hx: bool, device: str):
    """Traced as it is, with weights that require grad; the tracer's own check runs too."""
    ours = make_twins(kind, device=device).ours
    traced = torch.jit.trace(ours, arguments(ours, 4, 3, with_hx))
    for module in (traced, through_a_file(traced)):
        for steps, batch in ((4, 3), (7, 2), (1, 5)):
            given = arguments(ours, steps, batch, with_hx)
            assert_same(module(*given), ours(*given))
            assert_same_gradients(module, ours, *given)


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_deep_layers(kind: Kind, device: str):
    ours = make_twins(kind, device=device, **DEEP).ours
    traced = through_a_file(torch.jit.trace(ours, (make_input(ours),)))
    x = make_input(ours, 6, 2)
    assert_same(traced(x), ours(x))
    assert_same_gradients(traced, ours, x)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [LSTM, GRU_CELL], ids=str)
def test_frozen(kind: Kind, grad, device: str):
    """Without gradients it is the kernels' operator that stands there, whatever the mode."""
    ours = make_twins(kind, device=device).ours.requires_grad_(False)
    with grad():
        traced = through_a_file(torch.jit.trace(ours, (make_input(ours),)))
    assert "fused_rnn::cell_forward" in str(traced.graph) or "fused_rnn::layer_forward" in str(traced.graph)
    x = make_input(ours, 6, 2)
    assert_same(traced(x), ours(x))


@pytest.mark.parametrize("kind", [LSTM, GRU], ids=str)
def test_rows_and_batch_sizes(kind: Kind, device: str):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_twins(kind, device=device).ours

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            return self.layer(PackedSequence(data, batch_sizes))[0].data

    model = Rows()
    traced = torch.jit.trace(model, (torch.randn(6, 5, device=device), torch.tensor([3, 2, 1])))
    given = torch.randn(9, 5, device=device), torch.tensor([4, 4, 1])
    assert_same(traced(*given), model(*given))


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_the_old_onnx_exporter_is_told_the_way_out(kind: Kind):
    model = nn.Sequential(make_twins(kind).ours)
    x = make_input(model[0])
    with pytest.raises(RuntimeError, match=rf"fused_rnn\.{kind.cls}\..*fused_rnn\.revert.*dynamo=True"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    assert tensors_of(model(x))[0].requires_grad
    pytest.importorskip("onnx", reason="the exporter needs it")
    file = io.BytesIO()
    torch.onnx.export(fused_rnn.revert(copy.deepcopy(model)), (x,), file, dynamo=False)
    assert file.tell() > 0
