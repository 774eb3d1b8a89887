"""Derivatives of any order: finite differences of the first and second, and losses made of gradients."""

from __future__ import annotations

import pytest
import torch
from parity import (
    CELLS,
    GRU,
    KINDS,
    LAYERS,
    LSTM,
    assert_equal,
    assert_law,
    count_terms,
    leaves,
    make_input,
    make_twins,
    named_outputs,
    pack,
    tensors_of,
    weights_like,
)
from torch.autograd import gradcheck, gradgradcheck

layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)

ORDER_OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}]


def small(kind, **options):
    """A module small enough for finite differences, its leaves, and a function of all of them."""
    sizes = (2, 4) if kind.options.get("proj_size") else (2, 3)
    module = make_twins(kind, *sizes, dtype=torch.float64, **options).ours
    x, hx = leaves(module, 3, 2)
    names = [name for name, _ in module.named_parameters()]
    states = tensors_of(hx)

    def function(x, *rest, form=lambda x: x):
        hx, weights = rest[: len(states)], dict(zip(names, rest[len(states) :], strict=True))
        hx = hx if kind.is_lstm else hx[0]
        return tuple(tensors_of(torch.func.functional_call(module, weights, (form(x), hx))))

    return function, (x, *states, *(weight.detach().requires_grad_() for weight in module.parameters()))


@kinds
def test_gradcheck(kind, backend):
    function, inputs = small(kind, device=backend, **({} if kind.is_cell else ORDER_OPTIONS[1]))
    assert gradcheck(function, inputs, fast_mode=True, nondet_tol=0.0)


@layers
def test_gradcheck_of_packed(kind, backend):
    function, inputs = small(kind, device=backend, **ORDER_OPTIONS[1])
    assert gradcheck(lambda *a: function(*a, form=pack([2, 3])), inputs, fast_mode=True, nondet_tol=0.0)


@kinds
def test_gradgradcheck(kind, device):
    for options in [{}] if kind.is_cell else ORDER_OPTIONS:
        function, inputs = small(kind, device=device, **options)
        assert gradgradcheck(function, inputs, fast_mode=True, nondet_tol=0.0)


@layers
def test_gradgradcheck_of_packed(kind, device):
    function, inputs = small(kind, device=device, bidirectional=True)
    assert gradgradcheck(lambda *a: function(*a, form=pack([2, 3])), inputs, fast_mode=True, nondet_tol=0.0)


@kinds
@pytest.mark.parametrize("frozen", [None, "weight_ih", "weight_hh", "bias_hh"])
@pytest.mark.parametrize("input_grad", [False, True], ids="x={}".format)
def test_gradient_penalty(kind, frozen, input_grad, device):
    """A loss of gradients: the first derivative is itself recorded and differentiated."""
    if frozen == "weight_ih" and not input_grad:
        frozen = "bias_ih"  # the subject of test_recorded_backward_without_the_input
    twins = make_twins(kind, device=device, dtype=torch.float64)
    x, hx = leaves(twins.ours, 4, 3)
    x.requires_grad_(input_grad)

    def freeze(module):
        for name, weight in module.named_parameters():
            weight.requires_grad_(frozen is None or frozen not in name)

    twins.apply(freeze)

    def penalty(module):
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        named |= {n: leaf for n, leaf in {"x": x, "h": tensors_of(hx)[0]}.items() if leaf.requires_grad}
        outputs = named_outputs(module, module(x, hx))
        loss = sum((out * weights_like(out)).pow(2).sum() for out in outputs.values())
        first = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), list(named.values()))
        return dict(zip(named, first, strict=True)) | {
            f"second {n}": g for n, g in zip(named, second, strict=True)
        }

    ours, theirs = (
        {n: g.detach() for n, g in penalty(module).items()} for module in (twins.ours, twins.theirs)
    )
    # each order of derivative passes over the sequence once more
    assert_law((ours, theirs, theirs), terms=4 * count_terms(twins.ours, x))


@kinds
def test_recorded_backward_without_the_input(kind):
    """With the input and weight_ih both frozen, backward has no use for the input, and it is not kept. To
    record the backward pass would need it: a clear error, and the first derivative works."""
    ours = make_twins(kind).ours
    x, hx = leaves(ours, 4, 3)
    for name, weight in ours.named_parameters():
        weight.requires_grad_("weight_ih" not in name)
    wanted = [weight for weight in ours.parameters() if weight.requires_grad]
    loss = sum(out.pow(2).sum() for out in tensors_of(ours(x.detach(), hx)))
    assert all(grad.any() for grad in torch.autograd.grad(loss, wanted, retain_graph=True))
    with pytest.raises(RuntimeError, match=r"create_graph=True.*needs the layer's input"):
        torch.autograd.grad(loss, wanted, create_graph=True)


@pytest.mark.parametrize("kind", [GRU, LSTM, CELLS[2], CELLS[3]], ids=str)
def test_third_derivative(kind):
    twins = make_twins(kind, 2, 3, dtype=torch.float64)
    x = make_input(twins.ours, 2, 2).requires_grad_()

    def third(module):
        value = tensors_of(module(x))[0].pow(2).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad * weights_like(grad)).sum()
        return {"third": grad.detach()}

    ours, theirs = third(twins.ours), third(twins.theirs)
    assert_law((ours, theirs, theirs), terms=8 * count_terms(twins.ours, x))


@kinds
def test_recorded_backward_gives_the_same_gradients(kind, device):
    """create_graph takes another path than backward does."""
    twins = make_twins(kind, device=device, dtype=torch.float64)
    x, hx = leaves(twins.ours, 4, 3)
    everything = [x, *tensors_of(hx), *twins.ours.parameters()]

    def gradients(**how):
        outputs = tensors_of(twins.ours(x, hx))
        grads = torch.autograd.grad(outputs, everything, [weights_like(out) for out in outputs], **how)
        return {i: grad.detach() for i, grad in enumerate(grads)}

    plain, recorded = gradients(), gradients(create_graph=True)
    assert_law((recorded, plain, plain), terms=count_terms(twins.ours, x))
    assert_equal(plain, gradients())
