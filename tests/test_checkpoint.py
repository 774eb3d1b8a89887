"""Activation checkpointing: what is recomputed in the backward pass is what was computed, bit for bit."""

from __future__ import annotations

import pytest
import torch
from parity import (
    GRU,
    KINDS,
    LSTM,
    RNN,
    assert_law,
    count_terms,
    make_input,
    make_state,
    make_twins,
    named_outputs,
    pack,
    run,
    tensors_of,
    weights_like,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@kinds
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(kind, use_reentrant):
    ours = make_twins(kind, dtype=torch.float64).ours
    x, hx = make_input(ours).requires_grad_(), make_state(ours)
    expected = run(ours, x, hx)

    def flat(x: Tensor) -> tuple[Tensor, ...]:  # the reentrant kind sees no tensor inside a tuple
        return tuple(tensors_of(ours(x, hx)))

    found = run_backward(ours, x, lambda x: checkpoint(flat, x, use_reentrant=use_reentrant))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def run_backward(module: nn.Module, x: Tensor, call) -> dict[str, Tensor]:
    """By .backward(): reentrant checkpointing knows no other way."""
    for leaf in (x, *module.parameters()):
        leaf.grad = None
    values = named_outputs(module, call(x))
    torch.autograd.backward(list(values.values()), [weights_like(out) for out in values.values()])
    found = {name: value.detach() for name, value in values.items()}
    return (
        found
        | {"grad x": x.grad}
        | {f"grad {name}": weight.grad for name, weight in module.named_parameters()}
    )


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_and_packed_input(kind, use_reentrant):
    """The masks are drawn again, the same."""
    ours = make_twins(kind, dtype=torch.float64, num_layers=2, dropout=0.5).ours
    x = make_input(ours).requires_grad_()

    def call(x):
        return ours(pack([2, 4, 3])(x))

    def seeded(function):
        torch.manual_seed(4)
        return run_backward(ours, x, function)

    expected = seeded(call)
    found = seeded(lambda x: checkpoint(lambda x: tuple(tensors_of(call(x))), x, use_reentrant=use_reentrant))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_checkpointed_chunks_of_a_long_sequence(kind):
    """Recomputed chunk by chunk, with the state carried on: the gradients of the whole."""
    ours = make_twins(kind, dtype=torch.float64).ours
    x = make_input(ours, 12).requires_grad_()
    expected = run(ours, x)

    def in_chunks(x):
        hx, parts = None, []
        for chunk in x.split(4):
            part, hx = checkpoint(ours, chunk, hx, use_reentrant=False)
            parts.append(part)
        return torch.cat(parts), hx

    found = run(ours, x, call=in_chunks)
    assert_law((found, expected, expected), terms=count_terms(ours, x))
