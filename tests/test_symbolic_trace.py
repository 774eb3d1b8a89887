"""torch.fx.symbolic_trace: a layer or cell is one node of the graph, a call of the module, as torch.nn's are."""

from __future__ import annotations

import pytest
import torch
from parity import KINDS, Kind, make_input, make_state, make_twins, tensors_of
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.proxy import TraceError

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


class Twice(nn.Module):
    """A layer inside a container, called again with the states of the first call."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor, hx):
        layer = self.layers[0]
        result = layer(x, hx)
        return layer(x, hx=result if isinstance(layer, nn.RNNCellBase) else result[1])


class FromStates(nn.Module):
    """The input is a constant of the graph."""

    def __init__(self, layer: nn.Module, x: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("x", x)

    def forward(self, h: Tensor, c: Tensor):
        return self.layer(self.x, (h, c))


def assert_same(ours, theirs) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert torch.equal(a, b)


@kinds
def test_one_node_a_call(kind: Kind) -> None:
    twins = make_twins(kind)
    ours, theirs = (symbolic_trace(Twice(module)) for module in (twins.ours, twins.theirs))
    nodes, expected = ([(n.op, str(n.target)) for n in model.graph.nodes] for model in (ours, theirs))
    assert nodes == expected and nodes.count(("call_module", "layers.0")) == 2
    x, hx = make_input(twins.ours).requires_grad_(), make_state(twins.ours)
    found = ours(x, hx)
    assert_same(found, Twice(twins.ours)(x, hx))
    tensors_of(found)[0].sum().backward()
    assert all(leaf.grad is not None for leaf in (x, *twins.ours.parameters()))


@kinds
def test_without_states(kind: Kind) -> None:
    ours = make_twins(kind).ours
    traced, x = symbolic_trace(nn.Sequential(ours)), make_input(ours)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_same(traced(x), ours(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.is_lstm], ids=str)
def test_states_alone_are_traced(kind: Kind) -> None:
    ours = make_twins(kind).ours
    x, hx = make_input(ours), make_state(ours)
    assert_same(symbolic_trace(FromStates(ours, x))(*hx), ours(x, hx))


@kinds
def test_a_layer_alone_is_refused_as_torchs_is(kind: Kind) -> None:
    """As the root of a trace it would have to be looked into."""
    twins = make_twins(kind)
    for module in (twins.theirs, twins.ours):
        with pytest.raises(TraceError, match="symbolically traced variables cannot be used as inputs"):
            symbolic_trace(module)
