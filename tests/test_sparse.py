"""Sparse tensors: what torch.nn multiplies in a sparse layout is computed here too, and what it refuses is refused in
its words, not in those of an operator without a kernel."""

from __future__ import annotations

import pytest
import torch
from following import name
from parity import CELLS, KINDS, LAYERS, Kind, make_input, make_state, make_twins, tensors_of
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
cells = pytest.mark.parametrize("kind", CELLS, ids=str)


def sparsified(module: nn.Module, stem: str) -> None:
    """As after pruning: half of a frozen weight is zero, and only the other half is stored."""
    module.requires_grad_(False)
    weight = getattr(module, name(module, stem)).detach()
    kept = torch.where(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5, weight, 0)
    setattr(module, name(module, stem), nn.Parameter(kept.to_sparse_csr(), requires_grad=False))


def assert_close(ours, theirs) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert a.layout is b.layout is torch.strided
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("stem", ["weight_ih", "weight_hh"])
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_a_weight(kind: Kind, stem: str, with_hx: bool):
    twins = make_twins(kind, dtype=torch.float64)
    for module in (twins.ours, twins.theirs):
        sparsified(module, stem)
    x, hx = make_input(twins.ours), make_state(twins.ours) if with_hx else None
    assert_close(twins.ours(x, hx), twins.theirs(x, hx))


@cells
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_the_input_of_a_cell(kind: Kind, with_hx: bool, layout: torch.layout):
    """Such as one-hot rows. Gradients of the weights are dense."""
    twins = make_twins(kind, dtype=torch.float64)
    x, hx = torch.eye(3, 5, dtype=torch.float64), make_state(twins.ours) if with_hx else None

    def results(module: nn.Module) -> tuple[Tensor, ...]:
        outputs = tensors_of(module(x.to_sparse(layout=layout), hx))
        return *outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), list(module.parameters()))

    assert_close(results(twins.ours), results(twins.theirs))


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_the_input_of_a_layer_is_refused_as_by_torch(kind: Kind):
    twins = make_twins(kind)
    x = make_input(twins.ours).to_sparse()
    with pytest.raises(RuntimeError) as theirs:
        twins.theirs(x)
    with pytest.raises(type(theirs.value)) as ours:
        twins.ours(x)
    assert str(ours.value) == str(theirs.value)
