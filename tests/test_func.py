"""torch.func and forward mode on the kernels: derivatives of derivatives, of mapped calls, and tangents, and that what
is not supported raises. vmap alone: test_vmap.py; parity with torch.nn, where torch.nn can: test_transforms.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from mapped import assert_close, call, looped, loss, make, make_samples, weights_of
from parity import CLASSES, KINDS, LSTM, tensors_of, weights_like
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own remark, about itself

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)


# ------------------------------------------------------------------------------------------ higher derivatives


@classes
def test_gradient_of_mapped_gradients(kind):
    """A penalty on the gradient of each sample, by the weights: grad of vmap of grad."""
    module = make(kind)
    weights, x = weights_of(module), make_samples(module)[0]

    def penalty(mapped):
        def function(w):
            by_x = mapped(grad(lambda x: loss(module, w, x)))(x)
            by_w = mapped(lambda x: grad(lambda w: loss(module, w, x))(w))(x)
            return by_x.pow(2).sum() + sum(g.pow(3).sum() for g in by_w.values())

        return grad(function)(weights)

    found = penalty(vmap)
    expected = penalty(lambda function: lambda x: looped(function, (0,), x))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@classes
def test_autograd_outside_of_vmap(kind):
    """The tape of loss.backward() runs through a mapped call, and through mapped gradients."""
    module = make(kind)
    x = make_samples(module)[0].requires_grad_()
    leaves = [x, *module.parameters()]

    def function(mapped, order):
        outputs = lambda x: sum(out.pow(2).sum() for out in tensors_of(module(x)))  # noqa: E731
        value = mapped(outputs if order == 1 else grad(outputs))(x)
        return torch.autograd.grad(value.pow(2).sum(), leaves)

    for order in (1, 2):
        expected = function(lambda f: lambda x: torch.stack([f(one) for one in x]), order)
        torch.testing.assert_close(function(vmap, order), expected, rtol=1e-9, atol=1e-9)


@classes
def test_hessian_of_each_sample(kind):
    module = make(kind)
    weights, x = weights_of(module), make_samples(module)[0][..., :1, :]
    by_all = {
        "hessian": hessian(lambda x: loss(module, weights, x)),
        "jacfwd": jacfwd(lambda x: call(module, weights, x)[0]),
        "jacrev of jacfwd": jacrev(jacfwd(lambda x: loss(module, weights, x))),
        "jacrev of jacrev": jacrev(jacrev(lambda x: loss(module, weights, x))),
    }
    for function in by_all.values():
        torch.testing.assert_close(vmap(function)(x), looped(function, (0,), x), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ forward mode


def directional(function, x: Tensor, direction: Tensor) -> Tensor:
    """A central difference."""
    step = 1e-6
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


@kinds
def test_tangents_of_everything(kind):
    """Of input, states and each weight, by dual numbers and by jvp, against finite differences."""
    module = make(kind)
    weights, (x, *states) = weights_of(module), [t[0] for t in make_samples(module)]
    values = {"x": x, **{f"h{k}": state for k, state in enumerate(states)}, **weights}

    def function(**values):
        tensors = [values["x"], *(values[f"h{k}"] for k in range(len(states)))]
        return sum(
            (out * weights_like(out)).sum() for out in call(module, {n: values[n] for n in weights}, *tensors)
        )

    for name, value in values.items():
        tangent = torch.randn_like(value)
        one = lambda v, name=name: function(**{**values, name: v})  # noqa: E731
        expected = directional(one, value, tangent)
        assert expected.abs() > 1e-4, "a tangent of nothing tells nothing"
        with fwAD.dual_level():
            by_dual = fwAD.unpack_dual(one(fwAD.make_dual(value, tangent))).tangent
        _, by_jvp = jvp(one, (value,), (tangent,))
        torch.testing.assert_close([by_dual, by_jvp], [expected] * 2, rtol=1e-6, atol=1e-8)


@kinds
def test_tangents_of_a_backward_pass(kind):
    """Forward mode over a tape that was recorded before it began: no tangent is lost on the way."""
    module = make(kind)
    x = make_samples(module)[0][0].requires_grad_()
    leaves = [x, *module.parameters()]
    output = tensors_of(module(x))[0]
    incoming, tangent = torch.randn_like(output), torch.randn_like(output)
    # linear in what comes in, so its tangent is the gradient of the tangent
    expected = torch.autograd.grad(output, leaves, tangent, retain_graph=True)
    with fwAD.dual_level():
        found = torch.autograd.grad(output, leaves, fwAD.make_dual(incoming, tangent), retain_graph=True)
        found = [fwAD.unpack_dual(g) for g in found]
    assert all(g.tangent is not None for g in found)
    assert_close([g.tangent for g in found], list(expected))
    assert not any(g.primal.requires_grad for g in found)

    _, pull = vjp(lambda x: tensors_of(module(x))[0], x.detach())
    _, by_jvp = jvp(lambda g: pull(g)[0], (incoming,), (tangent,))
    assert_close(by_jvp, expected[0])


# --------------------------------------------------------------------------------------------------- the rest


@classes
def test_functionalize(kind):
    module = make(kind)
    x = make_samples(module)[0][0]
    assert_close(torch.func.functionalize(module)(x), module(x))


def test_dropout_under_vmap_asks_for_its_randomness():
    module = make(LSTM, num_layers=2, dropout=0.5)
    x = make_samples(module)[0]
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(x)
    twice = x[:1].expand(2, *x.shape[1:])
    same, different = (vmap(lambda x: module(x)[0], randomness=how)(twice) for how in ("same", "different"))
    assert_close(same[0], same[1])
    assert (different[0] - different[1]).abs().max() > 1e-3
