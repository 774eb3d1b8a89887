"""A layer's short way past Python and the dispatcher: the same bits, taken where nothing listens, and declined wherever
something would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from parity import GRU, LAYERS, LSTM, Kind, make_input, make_state, tensors_of
from test_cell_at_once import CONTEXTS, _Seen
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import ops

kinds = pytest.mark.parametrize("kind", LAYERS, ids=str)


def made(kind: Kind, **options: Any) -> tuple[nn.Module, Tensor, Any]:
    torch.manual_seed(0)
    module = kind.ours(5, 7, **kind.options, **options)
    return module, make_input(module), make_state(module)


def long_way(module: nn.Module, x: Any, hx: Any) -> Any:
    """A call that cannot be answered at once: a hook of the profiler listens."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert ops.layer_at_once(module, x, hx) is None
        return module(x, hx)


def taken(module: nn.Module, x: Any, hx: Any = None) -> bool:
    return ops.layer_at_once(module, x, hx) is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_state", [True, False])
@kinds
def test_gives_what_the_long_way_gives(kind, with_state, dtype, context) -> None:
    for options in (
        {},
        {"bias": False, "bidirectional": True},
        {"batch_first": True},
        {"num_layers": 2, "batch_first": True, "bidirectional": True, "dropout": 0.5},
    ):
        module, x, hx = made(kind, dtype=dtype, **options)
        module.eval()
        hx = hx if with_state else None
        with context():
            found, expected = ops.layer_at_once(module, x, hx), long_way(module, x, hx)
            called = module(x, hx)
        for result in (found, called):
            assert type(result) is tuple and type(result[1]) is type(expected[1])
            for a, b in zip(tensors_of(result), tensors_of(expected), strict=True):
                assert torch.equal(a, b)
                assert (a.stride(), a.is_inference()) == (b.stride(), b.is_inference())


@torch.no_grad()
def test_of_all_shapes() -> None:
    """The memory of one step or one row is the same in either order; that of no rows is none."""
    for batch_first in (False, True):
        module = fused_rnn.LSTM(5, 7, batch_first=batch_first)
        for steps, batch in ((1, 1), (1, 4), (6, 1), (3, 0)):
            x, hx = make_input(module, steps, batch), make_state(module, batch)
            for result in (module(x, hx), module(x.transpose(0, 1).clone().transpose(0, 1), hx)):
                for a, b in zip(tensors_of(result), tensors_of(long_way(module, x, hx)), strict=True):
                    assert torch.equal(a, b) and a.shape == b.shape


@kinds
def test_sees_every_change_of_the_weights(kind: Kind) -> None:
    """Nothing is kept from call to call, of weights or of options."""
    module, x, hx = made(kind)

    def check() -> None:
        assert taken(module, x, hx)
        for a, b in zip(tensors_of(module(x, hx)), tensors_of(long_way(module, x, hx)), strict=True):
            assert torch.equal(a, b)

    with torch.no_grad():
        check()
        first = module(x, hx)[0]
        module.weight_hh_l0.data.add_(1)
        assert not torch.equal(module(x, hx)[0], first)
        check()
        module.bias_hh_l0 = nn.Parameter(torch.randn_like(module.bias_hh_l0))
        check()
        module.weight_ih_l0 = made(kind)[0].weight_ih_l0
        check()
        given = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        called = torch.func.functional_call(module, given, (x, hx))
        module.load_state_dict(given)
        assert not taken(module, x, hx)  # the flat weights are those that were lent
        assert torch.equal(called[0], module(x, hx)[0])
        check()
        module._parameters["weight_hh_l0"] = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
        assert not taken(module, x, hx)  # the flat weights are those of before
        module(x, hx)
        check()


@pytest.mark.parametrize("name", CONTEXTS)
@kinds
def test_declines_where_something_listens(kind: Kind, name: str) -> None:
    module, x, hx = made(kind)
    with torch.no_grad():
        assert taken(module, x, hx)
        with CONTEXTS[name]():
            assert not taken(module, x, hx)
        assert taken(module, x, hx)


def test_takes_a_frozen_layer_with_grad_enabled() -> None:
    module, x, hx = made(GRU)
    module.requires_grad_(False)
    assert not ops.layer_at_once(module, x, hx)[0].requires_grad
    assert ops.layer_at_once(module, x, hx.clone().requires_grad_())[0].requires_grad
    assert ops.layer_at_once(module, x.requires_grad_(), hx)[0].requires_grad


# Of autograd: a Function in C++ in place of fused_rnn/autograd.py's, with the same results.


def recorded(kind: Kind, **options: Any) -> tuple[nn.Module, Tensor, Any, list[Tensor]]:
    """A module, input and states, and all that gradients may be asked for."""
    module, x, hx = made(kind, **options)
    leaves = [x, *(tensors_of(hx)), *module.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    return module, x, hx, leaves


def both_ways(module: nn.Module, x: Tensor, hx: Any) -> list[list[Tensor]]:
    return [tensors_of(ops.layer_at_once(module, x, hx)), tensors_of(long_way(module, x, hx))]


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.stride() == b.stride())


def cotangents_of(results: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape) for r in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "bidirectional": True},
        {"num_layers": 2, "batch_first": True, "bidirectional": True},
    ],
    ids=["plain", "both-ways", "stack"],
)
@kinds
def test_gives_the_gradients_of_the_function(kind, options, dtype) -> None:
    module, x, hx, leaves = recorded(kind, dtype=dtype, **options)
    for frozen in (None, *leaves):
        for leaf in leaves:
            leaf.requires_grad_(leaf is not frozen)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results = both_ways(module, x, hx)
        assert_same(*results)
        assert_same(*(torch.autograd.grad(r, wanted, cotangents_of(r)) for r in results))
    for which in range(len(results[0])):  # of one result, for one argument
        for leaf in wanted:
            results = both_ways(module, x, hx)
            gradients = [
                torch.autograd.grad(r[which], leaf, cotangents_of(r)[which], allow_unused=True)
                for r in results
            ]
            assert_same(*gradients)


@kinds
def test_gives_the_second_derivatives_of_the_function(kind: Kind) -> None:
    module, x, hx, leaves = recorded(kind, dtype=torch.float64, bidirectional=True)
    found = []
    for results in both_ways(module, x, hx):
        first = torch.autograd.grad(results, leaves, cotangents_of(results), create_graph=True)
        second = torch.autograd.grad([g.sin().sum() for g in first], leaves)
        found.append((*first, *second))
    assert_same(*found)
    assert torch.autograd.gradcheck(lambda x: ops.layer_at_once(module, x, hx)[0], (x,))


@kinds
def test_many_gradients_at_once(kind: Kind) -> None:
    module, x, hx, leaves = recorded(kind)
    found = []
    for output, *_ in both_ways(module, x, hx):
        batch = torch.stack([torch.ones_like(output), -torch.ones_like(output)])
        found.append(torch.autograd.grad(output, leaves, batch, is_grads_batched=True, allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@kinds
def test_autograd_keeps_its_promises(kind: Kind) -> None:
    module, x, hx, leaves = recorded(kind)
    output, *_ = both_ways(module, x, hx)[0]
    # what was saved may be written over in the last pass alone
    passes = [
        torch.autograd.grad(output.sum(), leaves, retain_graph=k < 2, allow_unused=True) for k in range(3)
    ]
    assert_same(passes[0], passes[1])
    assert_same(passes[0], passes[2])
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    output, *_ = both_ways(module, x, hx)[0]
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@kinds
def test_hooks_see_what_is_saved_and_keep_it(kind: Kind) -> None:
    module, x, hx, leaves = recorded(kind)
    kept: list[Tensor] = []
    shapes, gradients = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for way in (ops.layer_at_once, long_way):
            kept.clear()
            output, *_ = tensors_of(way(module, x, hx))
            before = [t.clone() for t in kept]
            gradients.append(torch.autograd.grad(output.sum(), leaves, allow_unused=True))
            assert_same(kept, before)
            shapes.append([t.shape for t in kept])
    assert shapes[0] == shapes[1]
    assert_same(*gradients)


def test_a_pass_that_failed_does_not_lend_what_it_may_have_spent() -> None:
    """The gate gradients of a GRU take the place of its gates, which no second pass may read."""
    module, x, hx, _ = recorded(GRU)
    output, _ = ops.layer_at_once(module, x, hx)
    right = module.weight_ih_l0.data
    module.weight_ih_l0.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="expected w_ih of size"):
        output.sum().backward()
    module.weight_ih_l0.data = right
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_mode_sees_the_backward_pass() -> None:
    module, x, hx, _ = recorded(GRU)
    output, _ = ops.layer_at_once(module, x, hx)
    with _Seen() as seen:
        output.sum().backward()
    assert "fused_rnn.layer_backward.default" in seen.names


def test_dropout_and_recompute_go_the_long_way() -> None:
    module, x, _ = made(LSTM, num_layers=2, dropout=0.5)
    assert not taken(module, x) and taken(module.eval(), x)
    assert taken(made(LSTM, num_layers=2)[0], x)
    module.recompute = True
    assert not taken(module, x)

    class Saving(fused_rnn.LSTM):
        recompute = True

    assert not taken(Saving(5, 7), x)


@torch.no_grad()
def test_declines_what_is_not_plain() -> None:
    class Subclass(Tensor):
        pass

    module, x, hx = made(LSTM)
    packed = pack_padded_sequence(x, torch.tensor([4, 3, 2]))
    for odd in (
        x.as_subclass(Subclass),
        x.to("meta"),
        x.double(),
        x.int(),
        x[0],
        x[:0],
        x[..., :4],
        packed,
        None,
    ):
        assert not taken(module, odd)
    h, c = hx
    for odd in (
        h,
        [h, c],
        (h,),
        (h, c, c),
        (h, None),
        (h[0], c),
        (h, c[:, :2]),
        (h.double(), c),
        (h, c[..., 1:]),
    ):
        assert not taken(module, x, odd)
    assert not taken(fused_rnn.GRU(5, 7), x, hx)
    assert not taken(fused_rnn.LSTM(5, 7, 2, dropout=0.5), x)
    assert not taken(object(), x) and not taken(nn.Linear(5, 7), x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
        lambda m: parametrize.register_parametrization(m, "bias_ih_l0", nn.Identity()),
        lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.5),
        lambda m: setattr(m, "input_size", 6),
        lambda m: m.__dict__.pop("batch_first"),
        lambda m: m._parameters.pop("weight_ih_l0"),
        lambda m: m._flat_weights.pop(),
    ],
)
@torch.no_grad()
def test_declines_a_module_that_was_changed(change: Callable) -> None:
    module, x, hx = made(GRU)
    assert taken(module, x, hx)
    change(module)
    assert not taken(module, x, hx)


@torch.no_grad()
def test_checks_of_a_subclass_are_asked() -> None:
    asked = []

    class Checks:
        def check_input(self, *args: Any) -> None:
            asked.append(args)
            super().check_input(*args)

    class Strict(Checks, fused_rnn.LSTM):
        pass

    class Stricter(Strict):
        pass

    class Lenient(Stricter):
        check_input = fused_rnn.LSTM.check_input

    for cls in (Strict, Stricter):
        cls(5, 7)(torch.randn(4, 3, 5))
        assert asked
        asked.clear()
    assert Lenient._checks_are_known and not Strict._checks_are_known


@torch.no_grad()
def test_modes_still_see_the_operator() -> None:
    module, x, hx = made(GRU)
    with _Seen() as seen:
        module(x, hx)
    assert "fused_rnn.layer_forward.default" in seen.names
