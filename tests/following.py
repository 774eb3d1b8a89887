"""What the tests of replaced weights share: a change made to ours and to torch.nn's that both must follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity import (
    Kind,
    Twins,
    assert_law,
    count_terms,
    make_input,
    make_state,
    make_twins,
    run,
    tensors_of,
)
from torch import nn


def make(kind: Kind, **options) -> Twins:
    return make_twins(kind, dtype=torch.float64, **({} if kind.is_cell else {"num_layers": 2}), **options)


def name(module: nn.Module, stem: str, layer: int = 0) -> str:
    """`weight_hh` is the name of a cell's weight, `weight_hh_l0` of a layer's."""
    return stem if isinstance(module, nn.RNNCellBase) else f"{stem}_l{layer}"


def compare(twins: Twins, **how) -> None:
    """Results and gradients of everything that is a parameter now."""
    x, hx = make_input(twins.ours).requires_grad_(), make_state(twins.ours)
    ours, theirs = run(twins.ours, x, hx, **how), run(twins.theirs, x, hx, **how)
    assert ours.keys() == theirs.keys()
    # a parametrization adds a few operations of its own to what count_terms counts
    assert_law((ours, theirs, theirs), terms=2 * count_terms(twins.ours, x))


def assert_follows(twins: Twins, change: Callable[[nn.Module], object]) -> None:
    """After `change` the results are torch.nn's, and are not those from before."""
    x, hx = make_input(twins.ours), make_state(twins.ours)
    with torch.no_grad():
        before = tensors_of(twins.ours(x, hx))
        twins.apply(change)
        after = tensors_of(twins.ours(x, hx))
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the change was not seen"
    compare(twins)
