"""Tensors without data, graphs without values: meta, fake tensors, inference mode, compile, export."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import (
    CELLS,
    GRU,
    GRU_CELL,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    RNN,
    Kind,
    make_input,
    make_state,
    make_twins,
    pack,
    run,
    tensors_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

# torch's own remarks, about itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:The tensor attributes? self._flat_weights"),
]

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
cells = pytest.mark.parametrize("kind", CELLS, ids=str)


def first(result) -> Tensor:
    return tensors_of(result)[0]


# ----------------------------------------------------------------------------------------------- without data


def described(result) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride(), t.requires_grad) for t in tensors_of(result)]


@kinds
@pytest.mark.parametrize("batch", [None, 0, 3], ids="batch={}".format)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["", "deep"]
)
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_meta(kind, batch, options, with_hx):
    """Shapes, dtypes and strides of the real thing, gradients too; nothing is computed."""
    options = {} if kind.is_cell else options
    ours = make_twins(kind, **options).ours
    x = make_input(ours, 4, batch).requires_grad_()
    hx = make_state(ours, batch) if with_hx else None
    meta = copy.deepcopy(ours).to("meta")
    meta_x = x.detach().to("meta").requires_grad_()
    meta_hx = None
    if with_hx:
        meta_hx = tuple(h.to("meta") for h in hx) if kind.is_lstm else hx.to("meta")
    real, found = ours(x, hx), meta(meta_x, meta_hx)
    assert {t.device.type for t in tensors_of(found)} == {"meta"}
    assert described(found) == described(real)
    sum(out.sum() for out in tensors_of(found)).backward()
    for leaf in (meta_x, *meta.parameters()):
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype and leaf.grad.is_meta


@layers
def test_meta_packed(kind):
    ours = make_twins(kind, bidirectional=True).ours
    x = pack([4, 2, 3])(make_input(ours, 4, 3))
    meta = copy.deepcopy(ours).to("meta")
    found, real = meta(x.to("meta")), ours(x)
    assert [(t.shape, t.dtype) for t in tensors_of(found)] == [(t.shape, t.dtype) for t in tensors_of(real)]
    first(found).sum().backward()
    assert all(weight.grad.is_meta for weight in meta.parameters())


@kinds
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["", "deep"]
)
def test_fake_tensors(kind, options):
    """As torch.compile and torch.export see a module; made inside the mode, and brought into it."""
    options = {} if kind.is_cell else options
    ours = make_twins(kind, **options).ours
    x = make_input(ours).requires_grad_()
    real = ours(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inside = kind.ours(5, 7, **kind.options, **options)
        fake_x = mode.from_tensor(x.detach()).requires_grad_()
        for module in (inside, ours):
            found = module(fake_x)
            assert described(found) == described(real)
            sum(out.sum() for out in tensors_of(found)).backward()
            assert fake_x.grad.shape == x.shape
            fake_x.grad = None
            for weight in module.parameters():
                weight.grad = None


@kinds
def test_inference_mode(kind):
    ours = make_twins(kind).ours
    x, hx = make_input(ours), make_state(ours)
    expected = tensors_of(ours(x, hx))
    with torch.inference_mode():
        found = tensors_of(ours(x, hx))
        for mine, its in zip(found, expected, strict=True):
            assert mine.is_inference() and torch.equal(mine, its)
        again = tensors_of(ours(x, tuple(found[-2:]) if kind.is_lstm else found[-1]))
    assert all(torch.isfinite(out).all() for out in again)
    ours.requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours(x, hx)), expected, strict=True))


@kinds
def test_modules_made_in_inference_mode(kind):
    with torch.inference_mode():
        ours = make_twins(kind).ours
        x = make_input(ours)
        assert all(out.is_inference() for out in tensors_of(ours(x)))
    with torch.no_grad():
        assert all(torch.isfinite(out).all() for out in tensors_of(ours(x)))


# --------------------------------------------------------------------------------------------------- captured


@cells
def test_compiled_cells(kind):
    """torch.nn's cells compile whole; the backend is one that runs the captured graph as it is."""
    torch._dynamo.reset()
    twins = make_twins(kind)
    x, hx = make_input(twins.ours).requires_grad_(), make_state(twins.ours)
    compiled = torch.compile(twins.ours, backend="aot_eager", fullgraph=True)
    found, expected = run(twins.ours, x, hx, call=compiled), run(twins.ours, x, hx)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ, GRU_CELL, LSTM_CELL], ids=str)
def test_exported(kind: Kind):
    """torch.export of one shape, run on other values."""
    ours = make_twins(kind).ours
    x = make_input(ours)
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
        other = make_input(ours)
        torch.testing.assert_close(tensors_of(program.module()(other)), tensors_of(ours(other)))


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_packed_by_fake_batch_sizes_is_no_crash(kind):
    """A PackedSequence whose batch sizes are no data: an error, or a result of the right shape."""
    ours = make_twins(kind).ours
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = torch.randn(6, 5)
        try:
            output, _ = ours(PackedSequence(data, torch.tensor([3, 2, 1])))
        except Exception as error:
            assert str(error)
        else:
            assert output.data.shape == (6, 7)
