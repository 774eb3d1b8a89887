"""A cell's short way past the dispatcher: taken where nothing listens, declined wherever something would."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import autograd, ops

CELLS = {"lstm": fused_rnn.LSTMCell, "gru": fused_rnn.GRUCell, "rnn_tanh": fused_rnn.RNNCell}


def made(cell: str, batch: int = 3, **kwargs) -> tuple[nn.Module, Tensor, Tensor | tuple[Tensor, Tensor]]:
    module = CELLS[cell](5, 7, **kwargs)
    x, *states = (torch.randn(batch, n, dtype=kwargs.get("dtype")) for n in (5, 7, 7))
    return module, x, tuple(states) if cell == "lstm" else states[0]


def short(cell: str, module: nn.Module, x: Tensor, hx: object) -> Tensor | tuple[Tensor, Tensor] | None:
    return ops.cell_at_once(cell, module._parameters, x, hx)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_gives_what_the_operator_gives(cell, with_state, bias, dtype, context) -> None:
    module, x, hx = made(cell, bias=bias, dtype=dtype)
    hx = hx if with_state else None
    h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
    with context():
        weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        h, c, _ = ops.cell_forward(cell, x, h0, c0, *weights, False)
        found = short(cell, module, x, hx)
        called = module(x, hx)
    for y in (found, called):
        assert torch.equal(y[0] if cell == "lstm" else y, h)
        assert cell != "lstm" or torch.equal(y[1], c)
    assert h.is_inference() == (found[0] if cell == "lstm" else found).is_inference()


@pytest.mark.parametrize("cell", CELLS)
def test_sees_every_change_of_the_weights(cell: str) -> None:
    """It keeps nothing from call to call, packed weights least: a write by way of ``.data``, or of NumPy, leaves no
    trace in the version counter that a cache would ask."""
    module, x, hx = made(cell)
    other = CELLS[cell](5, 7)

    def check() -> None:
        fresh = CELLS[cell](5, 7)
        fresh.load_state_dict(module.state_dict())
        for a, b in zip(module(x, hx), fresh(x, hx), strict=True):
            assert torch.equal(a, b)

    with torch.no_grad():
        check()
        module.weight_hh.mul_(2)
        check()
        version = module.weight_hh._version
        module.weight_hh.data.add_(1)
        assert module.weight_hh._version == version
        check()
        module.load_state_dict(other.state_dict())
        check()
        module.weight_ih = other.weight_ih  # tied
        other.weight_ih.neg_()
        check()
        module.bias_hh = nn.Parameter(torch.randn_like(module.bias_hh))
        check()
        given = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        called = torch.func.functional_call(module, given, (x, hx))
        module.load_state_dict(given)
        assert torch.equal(called[0], module(x, hx)[0])


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable] = {
    "autocast": lambda: torch.autocast("cpu"),
    "dispatch mode": _Seen,
    "function mode": _Functions,
    "device": lambda: torch.device("cpu"),
    "forward AD": forward_ad.dual_level,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("cell", CELLS)
def test_declines_where_something_listens(cell: str, name: str) -> None:
    module, x, hx = made(cell)
    with torch.no_grad():
        assert short(cell, module, x, hx) is not None
        with CONTEXTS[name]():
            assert short(cell, module, x, hx) is None
        assert short(cell, module, x, hx) is not None


def test_takes_a_frozen_cell_with_grad_enabled() -> None:
    module, x, hx = made("gru")
    module.requires_grad_(False)
    assert not short("gru", module, x, hx).requires_grad
    assert short("gru", module, x.requires_grad_(), hx).requires_grad


# Of autograd: a Function in C++ in place of fused_rnn/autograd.py's, with the same results.


def arguments(
    cell: str, module: nn.Module, x: Tensor, hx: Tensor | tuple[Tensor, ...] | None
) -> tuple[Tensor | None, ...]:
    h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
    return x, h0, c0, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh


def both_ways(cell: str, module: nn.Module, x: Tensor, hx: object) -> list[tuple[Tensor, ...]]:
    at_once = short(cell, module, x, hx)
    by_python = autograd.Cell.apply(cell, *arguments(cell, module, x, hx))
    return [at_once if cell == "lstm" else (at_once,), by_python if cell == "lstm" else by_python[:1]]


def recorded(cell: str, **kwargs) -> tuple[nn.Module, Tensor, Tensor | tuple[Tensor, Tensor]]:
    module, x, hx = made(cell, **kwargs)
    states = hx if cell == "lstm" else (hx,)
    for tensor in (x, *states):
        tensor.requires_grad_()
    return module, x, hx


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_gives_the_gradients_of_the_function(cell, with_state, bias, dtype) -> None:
    module, x, hx = recorded(cell, bias=bias, dtype=dtype)
    given = [t for t in arguments(cell, module, x, hx if with_state else None) if t is not None]
    cotangents = [torch.randn(3, 7, dtype=dtype) for _ in range(2)]
    for frozen in (None, *given):
        for tensor in given:
            tensor.requires_grad_(tensor is not frozen)
        wanted = [t for t in given if t.requires_grad]
        results = both_ways(cell, module, x, hx if with_state else None)
        assert_same(*results)
        found = [torch.autograd.grad(r, wanted, cotangents[: len(r)]) for r in results]
        assert_same(*found)
    for which in range(2 if cell == "lstm" else 1):  # of one result, for one argument
        for tensor in wanted:
            results = both_ways(cell, module, x, hx if with_state else None)
            assert_same(*(torch.autograd.grad(r[which], tensor, cotangents[0]) for r in results))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_gives_the_second_derivatives_of_the_function(cell, bias) -> None:
    module, x, hx = recorded(cell, bias=bias, dtype=torch.float64)
    given = [t for t in arguments(cell, module, x, hx) if t is not None]
    found = []
    for result in both_ways(cell, module, x, hx):
        cotangents = [torch.linspace(-1, 1, 21, dtype=x.dtype).view(3, 7).requires_grad_() for _ in result]
        first = torch.autograd.grad(result, given, cotangents, create_graph=True)
        second = torch.autograd.grad([g.sin().sum() for g in first], [*given, *cotangents], create_graph=True)
        third = torch.autograd.grad([g.sin().sum() for g in second], [*given, *cotangents], allow_unused=True)
        found.append((*first, *second, *third))
    assert_same(*found)
    assert torch.autograd.gradcheck(lambda x: short(cell, module, x, hx), (x,))


@pytest.mark.parametrize("cell", CELLS)
def test_many_gradients_at_once_and_jacobians(cell) -> None:
    module, x, hx = recorded(cell)
    found = []
    for result in both_ways(cell, module, x, hx):
        batch = torch.linspace(-1, 1, 42).view(2, 3, 7)
        found.append(torch.autograd.grad(result[0], [x, module.weight_hh], batch, is_grads_batched=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_autograd_keeps_its_promises(cell) -> None:
    module, x, hx = recorded(cell)
    h = short(cell, module, x, hx)
    h = h[0] if cell == "lstm" else h
    h.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        h.sum().backward()
    h = module(x, hx)
    h = h[0] if cell == "lstm" else h
    with torch.no_grad():
        module.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        short(cell, module, x, hx)
        ours, kept[:] = [t.shape for t in kept], []
        autograd.Cell.apply(cell, *arguments(cell, module, x, hx))
    assert ours == [t.shape for t in kept]


def test_a_mode_sees_the_backward_pass() -> None:
    module, x, hx = recorded("gru")
    h = short("gru", module, x, hx)
    with _Seen() as seen:
        h.sum().backward()
    assert "fused_rnn.cell_backward.default" in seen.names


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_declines_tensors_that_are_not_plain(cell: str) -> None:
    class Subclass(Tensor):
        pass

    module, x, hx = made(cell)
    for odd in (
        x.as_subclass(Subclass),
        x.to("meta"),
        x.int(),
        x.double(),
        x[0],
        x[:, :4],
        x[:2],
        x.to_sparse(),
        torch._neg_view(x),
        None,
        "x",
    ):
        assert short(cell, module, odd, hx) is None
    for odd in ("h", x, (x,), [x, x], (x, x, x), (None, None), torch.randn(3, 8)):
        assert short(cell, module, x, odd) is None
    assert short(cell, module, x, hx[0] if cell == "lstm" else (hx, hx)) is None


@torch.no_grad()
def test_declines_inside_transforms() -> None:
    module, x, hx = made("gru")
    tried = []

    def call(x: Tensor) -> Tensor:
        tried.append(short("gru", module, x[None], hx[:1]))
        return module(x[None], hx[:1])[0]

    mapped = torch.func.vmap(call)(x)
    assert tried == [None]
    torch.testing.assert_close(mapped, module(x, hx[:1].expand(3, -1)))
    torch.func.jvp(call, (x[0],), (x[1],))
    assert tried == [None, None]


@torch.no_grad()
def test_declines_weights_that_are_not_parameters() -> None:
    module, x, hx = made("gru")
    parametrizations.weight_norm(module, "weight_hh")
    assert short("gru", module, x, hx) is None
    expected = torch.nn.GRUCell(5, 7)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(expected, name).copy_(getattr(module, name))
    torch.testing.assert_close(module(x, hx), expected(x, hx))


@torch.no_grad()
def test_modes_still_see_the_operator() -> None:
    module, x, hx = made("gru")
    with _Seen() as seen:
        module(x, hx)
    assert "fused_rnn.cell_forward.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x, hx)
    assert "fused_rnn::cell_forward" in {event.key for event in profile.key_averages()}
