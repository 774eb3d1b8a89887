"""Derivatives of any order: finite differences of the first and second, and losses made of gradients."""

from __future__ import annotations

import collections

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
    upcast,
    weights_like,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn import _C

layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
isas = pytest.mark.parametrize("isa", _C.isas())  # each has its own kernels

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


class Count(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@kinds
def test_both_orders_are_kernels(kind):
    """One call of an operator for each; and nothing that grows with the sequence."""
    ours = make_twins(kind).ours

    def calls(steps: int) -> collections.Counter[str]:
        x, hx = leaves(ours, steps, 3)
        ours.zero_grad()
        with Count() as count:
            loss = sum(out.pow(2).sum() for out in tensors_of(ours(x, hx)))
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            grad.pow(2).sum().backward()
        return count.calls

    few, many = calls(3), calls(5)
    assert few == many
    assert few["fused_rnn.layer_double_backward.default"] == 1
    assert few["fused_rnn.layer_backward.default"] + few["fused_rnn.cell_backward.default"] == 2


@layers
@isas
@pytest.mark.parametrize("lengths", [None, [9, 9, 7, 4, 4, 2, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "bias": False}], ids=["plain", "both ways"])
def test_second_derivative_of_larger_layers(kind, lengths, options, isa):
    """Units and rows that fill no vector and no tile, shared by two threads in each of the planner's ways: the
    derivative of the backward pass in a direction, against torch.nn in float64."""
    _C.set_isa(isa)
    torch.set_num_threads(2)
    for hidden, batch in ((19, 7), (70, 40)):
        if lengths and batch != len(lengths):
            continue
        twins = make_twins(kind, 6, hidden, dtype=torch.float64, **options)
        x, hx = leaves(twins.ours, 9, batch)
        form = pack(lengths, enforce_sorted=True) if lengths else lambda x: x
        arguments = [x, *tensors_of(hx), *twins.ours.parameters()]

        def penalty(module, x, hx, arguments):
            outputs = tensors_of(module(form(x), hx))  # noqa: B023
            loss = sum((out * weights_like(out)).pow(2).sum() for out in outputs)
            first = torch.autograd.grad(loss, arguments, create_graph=True)
            return torch.autograd.grad(sum((g * weights_like(g)).sum() for g in first), arguments)

        found = penalty(twins.ours, x, hx, arguments)
        expected = penalty(twins.theirs, x, hx, [x, *tensors_of(hx), *twins.theirs.parameters()])
        names = ["x", *(f"hx[{k}]" for k in range(len(tensors_of(hx)))), *dict(twins.ours.named_parameters())]
        ours, theirs = dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True))
        assert_law((ours, theirs, theirs), terms=4 * count_terms(twins.ours, x))


@kinds
@isas
def test_second_derivative_in_float32(kind, isa):
    """By the law of the first: no further from float64 than torch.nn's."""

    def penalty(module, x, hx):
        outputs = named_outputs(module, module(x, hx))
        named = {"x": x, **dict(module.named_parameters())}
        loss = sum((out * weights_like(out)).pow(2).sum() for out in outputs.values())
        first = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), list(named.values()))
        return dict(zip(named, second, strict=True))

    _C.set_isa(isa)
    runs = []
    for seed in range(8):
        twins = make_twins(kind, 6, 19, seed=seed)
        x, hx = leaves(twins.ours, 6, 5)
        runs.append(
            (
                penalty(twins.ours, x, hx),
                penalty(twins.theirs, x, hx),
                penalty(twins.exact, upcast(x), upcast(hx)),
            )
        )
    assert_law(*runs)


@kinds
def test_second_derivative_of_a_batch_of_none(kind):
    ours = make_twins(kind).ours
    x, hx = leaves(ours, 4, 0)
    loss = sum(out.pow(2).sum() for out in tensors_of(ours(x, hx)))
    first = torch.autograd.grad(loss, list(ours.parameters()), create_graph=True)
    second = torch.autograd.grad(
        sum(g.pow(2).sum() for g in first), [x, *ours.parameters()], allow_unused=True
    )
    assert not any(g.any() for g in second if g is not None)


def gradients_beside_a_penalty(module, x) -> list[torch.Tensor]:
    """Of a loss and of the squares of its gradients."""
    wanted = [x, *module.parameters()]
    loss = sum(out.pow(2).sum() for out in tensors_of(module(x)))
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    return list(torch.autograd.grad(loss + sum(grad.pow(2).sum() for grad in first), wanted))


@kinds
def test_a_loss_and_its_penalty_go_back_together(kind):
    """In one pass: the second derivative's part joins that of the loss."""
    ours = make_twins(kind, dtype=torch.float64).ours
    x, _ = leaves(ours, 5, 3, with_hx=False)
    with Count() as count:
        found = gradients_beside_a_penalty(ours, x)
    assert sum(n for name, n in count.calls.items() if "fused_rnn" in name and "_backward" in name) == 3
    with torch.autograd.graph.save_on_cpu():  # hooks would take the link between the two for data
        expected = gradients_beside_a_penalty(ours, x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@layers
def test_a_penalty_outlives_the_graph_of_its_loss(kind):
    ours = make_twins(kind, dtype=torch.float64).ours
    x, _ = leaves(ours, 5, 3, with_hx=False)
    wanted = [x, *ours.parameters()]

    def penalty(keep: bool) -> tuple[torch.Tensor, ...]:
        loss = sum((out * weights_like(out)).sum() for out in tensors_of(ours(x)))
        first = torch.autograd.grad(loss, wanted, create_graph=True, retain_graph=keep)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), wanted)

    torch.testing.assert_close(penalty(keep=False), penalty(keep=True), rtol=1e-11, atol=1e-11)


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
    """With the input and weight_ih both frozen, neither derivative has a use for the input, and it is not kept. A
    third one goes where it is needed: a clear error."""
    ours = make_twins(kind, dtype=torch.float64).ours
    x, hx = leaves(ours, 4, 3)
    wanted = [weight for name, weight in ours.named_parameters() if "weight_ih" not in name]

    def derivatives(x) -> list[torch.Tensor]:
        loss = sum(out.pow(2).sum() for out in tensors_of(ours(x, hx)))
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        penalty = sum(grad.pow(2).sum() for grad in first)
        return [*first, *torch.autograd.grad(penalty, wanted, create_graph=True)]

    expected = derivatives(x)
    for name, weight in ours.named_parameters():
        weight.requires_grad_("weight_ih" not in name)
    found = derivatives(x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="needs the layer's input"):
        torch.autograd.grad(found[-1].sum(), wanted)


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
