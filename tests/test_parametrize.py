"""Weights that are computed from others: parametrizations, weight norm, pruning, weight drop.

Each test does the same thing to ours and to torch.nn's and reads results and gradients of both, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from following import assert_follows, compare, make, name
from parity import (
    KINDS,
    LAYERS,
    Twins,
    assert_law,
    count_terms,
    make_input,
    make_state,
    run,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)


@layers
def test_weight_drop(kind):
    """AWD-LSTM's way: the parameter is taken away, and for each call a tensor computed from it put there."""
    twins = make(kind)

    def take_away(module):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)

    twins.apply(take_away)

    def dropped(module):
        def call(*args):
            torch.manual_seed(3)
            module.weight_hh_l0 = nn.functional.dropout(module.weight_hh_l0_raw, 0.5)
            return module(*args)

        return call

    x, hx = make_input(twins.ours).requires_grad_(), make_state(twins.ours)
    ours, theirs = (run(module, x, hx, call=dropped(module)) for module in (twins.ours, twins.theirs))
    assert "grad weight_hh_l0_raw" in ours and "grad weight_hh_l0" not in ours
    assert ours["grad weight_hh_l0_raw"].eq(0).any(), "nothing was dropped"
    assert_law((ours, theirs, theirs), terms=count_terms(twins.ours, x))


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
}


@kinds
@pytest.mark.parametrize("which", PARAMETRIZATIONS)
@pytest.mark.parametrize("stem", ["weight_ih", "weight_hh"])
def test_parametrizations(kind, which, stem):
    twins = make(kind)

    def register(module):
        torch.manual_seed(8)  # spectral_norm draws its first vectors
        PARAMETRIZATIONS[which](module, name(module, stem))

    twins.apply(register)
    compare(twins)
    with parametrize.cached():
        compare(twins)
    twins.apply(lambda m: parametrize.remove_parametrizations(m, name(m, stem)))
    compare(twins)


@kinds
def test_parametrization_of_every_weight(kind):
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    def register(module):
        for n in [n for n, _ in module.named_parameters()]:
            parametrize.register_parametrization(module, n, Doubled())

    twins = make(kind)
    assert_follows(twins, register)


@kinds
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weight_norm_by_hooks(kind):
    twins = make(kind)
    twins.apply(lambda m: nn.utils.weight_norm(m, name(m, "weight_hh")))
    compare(twins)

    def grow(module):
        with torch.no_grad():
            getattr(module, name(module, "weight_hh") + "_g").mul_(3)

    assert_follows(twins, grow)
    twins.apply(lambda m: nn.utils.remove_weight_norm(m, name(m, "weight_hh")))
    compare(twins)


@kinds
def test_spectral_norm_by_hooks(kind):
    twins = make(kind)

    def register(module):
        torch.manual_seed(8)
        nn.utils.spectral_norm(module, name(module, "weight_hh"))

    compare(twins.apply(register))


@kinds
@pytest.mark.parametrize(
    "method", [prune.l1_unstructured, prune.random_unstructured], ids=lambda f: f.__name__
)
def test_pruning(kind, method):
    twins = make(kind)

    def cut(module):
        torch.manual_seed(8)
        method(module, name(module, "weight_hh"), amount=0.5)

    assert_follows(twins, cut)
    x = make_input(twins.ours)
    values = run(twins.ours, x)
    mask = getattr(twins.ours, name(twins.ours, "weight_hh") + "_mask")
    assert not values["grad " + name(twins.ours, "weight_hh") + "_orig"][mask == 0].any()
    twins.apply(lambda m: prune.remove(m, name(m, "weight_hh")))
    compare(twins)


COMPUTED = {
    "pruned": lambda m: prune.l1_unstructured(m, name(m, "weight_hh"), amount=0.5),
    "parametrized": lambda m: parametrizations.weight_norm(m, name(m, "weight_hh")),
}


@kinds
@pytest.mark.parametrize("how", COMPUTED)
def test_copies_with_a_computed_weight(kind, how):
    """After a call without grad has renewed the weight: torch copies no tensor that has a history."""
    twins = make(kind).apply(COMPUTED[how])
    x, hx = make_input(twins.ours), make_state(twins.ours)
    with torch.no_grad():
        expected = tensors_of(twins.ours(x, hx))
        other = copy.deepcopy(twins.ours)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(other(x, hx)), expected, strict=True))
    compare(Twins(kind, other, twins.theirs, twins.exact))
