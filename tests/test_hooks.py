"""Hooks on results, such as those that clip the gradients of states: each hears of the gradient of its own tensor, and
is not called where there is none, as in torch.nn, whose results come from operations of their own."""

from __future__ import annotations

import contextlib

import pytest
import torch
from parity import KINDS, LAYERS, Kind, make_input, make_twins, pack, tensors_of, weights_like
from torch import Tensor, nn

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def with_a_listener():
    """So that a call is not answered at once, but by way of Python."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


ways = pytest.mark.parametrize("way", [contextlib.nullcontext, with_a_listener], ids=["at once", "long way"])


def assert_hooks_hear_of_their_own(module: nn.Module, x, way) -> None:
    def outputs() -> list[Tensor]:
        with way():
            return tensors_of(module(x))

    count = len(outputs())
    for used in range(count):
        results = outputs()
        seen: list[list[Tensor]] = [[] for _ in results]
        for result, heard in zip(results, seen, strict=True):
            result.register_hook(heard.append)
        gradient = weights_like(results[used])
        results[used].backward(gradient, retain_graph=True)
        assert [len(heard) for heard in seen] == [k == used for k in range(count)]
        assert torch.equal(seen[used][0], gradient)


@kinds
@ways
def test_a_hook_hears_of_its_own_gradient_alone(kind: Kind, way):
    twins = make_twins(kind, dtype=torch.float64)
    x = make_input(twins.ours)
    assert_hooks_hear_of_their_own(twins.ours, x, way)
    if kind.cls != "LSTMCell":  # whose c lies on the way to h
        assert_hooks_hear_of_their_own(twins.theirs, x, way)


@pytest.mark.parametrize("kind", LAYERS, ids=str)
@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "dropout": 0.5}, {"bidirectional": True, "batch_first": True}], ids=str
)
@ways
def test_of_deep_layers(kind: Kind, options: dict, way):
    ours = make_twins(kind, **options).ours
    assert_hooks_hear_of_their_own(ours, make_input(ours), way)


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_of_packed_input(kind: Kind):
    ours = make_twins(kind).ours
    assert_hooks_hear_of_their_own(ours, pack([4, 3, 1])(make_input(ours)), contextlib.nullcontext)


@kinds
@ways
def test_a_hook_changes_the_gradient(kind: Kind, way):
    """What it returns is what goes back."""
    ours = make_twins(kind).ours
    x = make_input(ours)

    def gradients(scale: float, hooked: bool) -> tuple[Tensor, ...]:
        with way():
            results = tensors_of(ours(x))
        if hooked:
            for result in results:
                result.register_hook(lambda grad: grad * scale)
        loss = sum((weights_like(result) * result).sum() for result in results)
        return torch.autograd.grad(loss if hooked else scale * loss, list(ours.parameters()))

    for a, b in zip(gradients(0.5, True), gradients(0.5, False), strict=True):
        assert torch.equal(a, b)


@kinds
@ways
def test_results_may_be_detached_in_place(kind: Kind, way):
    """As states are between two pieces of a sequence; a view could not be."""
    ours = make_twins(kind).ours
    with way():
        results = tensors_of(ours(make_input(ours)))
    for result in results:
        assert result.requires_grad and not result._is_view()
        assert not result.detach_().requires_grad


@kinds
def test_a_long_chain_of_states_lets_go(kind: Kind):
    """A graph is taken apart without one call of a destructor inside another for every step."""
    ours = make_twins(kind).ours
    x, hx = make_input(ours, 1, 1), None
    for _ in range(20000):
        result = ours(x, hx)
        hx = result if kind.is_cell else result[1]
    assert all(state.requires_grad for state in tensors_of(hx))
    del result, hx
