"""vmap on the kernels: over inputs and states, over weights, over gradients. Each against a Python loop, with the
number of operators that are called.
"""

from __future__ import annotations

import pytest
import torch
from mapped import DEEP, SAMPLES, assert_close, call, count, looped, loss, make, make_samples, weights_of
from parity import CLASSES, GRU, KINDS, LAYERS, LSTM_PROJ
from torch import Tensor, nn
from torch.func import grad, jacrev, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own remark, about itself

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)


# --------------------------------------------------------------------------------------- inputs and states mapped


def which_are_mapped(kind) -> list[tuple[int | None, ...]]:
    """Dimensions of x and of each state: all, the input alone, a state alone, the last state alone."""
    states = 2 if kind.is_lstm else 1
    return [
        (0,) * (1 + states),
        (0, *(None,) * states),
        (None, 0, *(None,) * (states - 1)),
        (None,) * states + (0,),
    ]


@kinds
@pytest.mark.parametrize("options", [{}, DEEP], ids=["plain", "deep"])
def test_vmap_over_inputs_and_states(kind, options):
    if kind.is_cell and options:
        options = {"bias": False}
    module = make(kind, **options)
    samples, weights = make_samples(module), weights_of(module)
    for dims in which_are_mapped(kind):
        tensors = [t if dim == 0 else t[0] for t, dim in zip(samples, dims, strict=True)]

        def outputs(*tensors):
            return call(module, weights, *tensors)

        def gradients(*tensors):
            everything = tuple(range(len(tensors)))
            return grad(lambda *given: loss(module, weights, *given), everything)(*tensors)

        for function in (outputs, gradients):
            assert_close(vmap(function, dims)(*tensors), looped(function, dims, *tensors))


@kinds
def test_the_mapped_dimension_may_be_any(kind):
    module = make(kind)
    x = make_samples(module)[0]
    weights = weights_of(module)
    expected = looped(lambda x: call(module, weights, x), (0,), x)
    for dim in range(1, x.dim()):
        assert_close(vmap(lambda x: call(module, weights, x), dim)(x.movedim(0, dim)), expected)


@classes
def test_nested_vmap(kind):
    """Over a batch of batches, and so that each dimension maps something of its own."""
    module = make(kind)
    weights, (x, h, *c) = weights_of(module), make_samples(module)
    function = grad(lambda x, *states: loss(module, weights, x, *states), tuple(range(2 + len(c))))
    grid = vmap(vmap(function, (None, 0, *(None for _ in c))), (0, None, *(0 for _ in c)))(x, h, *c)
    for i in range(SAMPLES):
        for j in range(SAMPLES):
            assert_close([g[i, j] for g in grid], list(function(x[i], h[j], *(t[i] for t in c))))


@kinds
def test_vmap_over_inputs_is_one_call_of_the_kernels(kind):
    """Of a bigger batch; and no product is made elsewhere, forward or backward."""
    module = make(kind, **({} if kind.is_cell else DEEP))
    weights, x = weights_of(module), make_samples(module)[0]
    forward = count(vmap(lambda x: call(module, weights, x)), x)
    assert forward.of("fused_rnn.") == (1 if kind.is_cell else 2)
    both = count(vmap(grad(lambda x: loss(module, weights, x))), x)
    assert both.of("fused_rnn.layer_backward") == (1 if kind.is_cell else 2)
    for counter in (forward, both):
        assert not any(counter.of(f"aten.{name}") for name in ("mm", "addmm", "bmm", "baddbmm", "matmul"))


@layers
def test_vmap_over_packed_rows(kind):
    module = make(kind, bidirectional=True)
    weights, batch_sizes = weights_of(module), torch.tensor([3, 2, 2, 1])
    rows = torch.randn(SAMPLES, 8, 4, dtype=torch.float64)
    states = make_samples(module)[1:]

    def outputs(rows, *states):
        return call(module, weights, PackedSequence(rows, batch_sizes), *states)

    gradients = grad(lambda *t: sum(out.pow(2).sum() for out in outputs(*t)), tuple(range(1 + len(states))))

    for function in (outputs, gradients):
        for dims in which_are_mapped(kind):
            tensors = [t if dim == 0 else t[0] for t, dim in zip((rows, *states), dims, strict=True)]
            assert_close(vmap(function, dims)(*tensors), looped(function, dims, *tensors))


def test_vmap_over_batch_sizes_raises():
    module = make(GRU)
    rows, sizes = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[2, 1], [2, 1]])
    with pytest.raises(RuntimeError, match="vmap over batch_sizes"):
        vmap(lambda rows, sizes: module(PackedSequence(rows, sizes))[0].data)(rows, sizes)


@classes
def test_vmap_without_samples_of_a_batch(kind):
    """A batch of none, mapped over."""
    module = make(kind)
    x = make_samples(module)[0]
    empty = x[:, :0] if kind.is_cell else x[:, :, :0]
    weights = weights_of(module)
    function = grad(lambda w, x: loss(module, w, x))
    assert_close(vmap(function, (None, 0))(weights, empty), looped(function, (None, 0), weights, empty))


# --------------------------------------------------------------------------------------------- weights mapped


def stacked(kind, **options) -> tuple[nn.Module, dict[str, Tensor]]:
    modules = [make(kind, seed=seed, **options) for seed in range(SAMPLES)]
    weights, _ = stack_module_state(modules)
    return modules[0], {name: weight.detach() for name, weight in weights.items()}


@kinds
def test_an_ensemble(kind):
    """Results and gradients; of one input for all members, and of an input for each."""
    module, weights = stacked(kind)
    x = make_samples(module)[0]
    for dims in ((0, None), (0, 0)):
        inputs = x if dims[1] == 0 else x[0]
        for function in (lambda w, x: call(module, w, x), grad(lambda w, x: loss(module, w, x), (0, 1))):
            assert_close(vmap(function, dims)(weights, inputs), looped(function, dims, weights, inputs))


@layers
def test_an_ensemble_of_deep_layers(kind):
    module, weights = stacked(kind, **DEEP)
    x = make_samples(module)[0]
    function = grad(lambda w, x: loss(module, w, x))
    assert_close(vmap(function)(weights, x), looped(function, (0, 0), weights, x))


@kinds
def test_an_ensemble_does_not_loop_over_its_members(kind):
    module, weights = stacked(kind)
    x = make_samples(module)[0]
    for function in (lambda w, x: call(module, w, x), grad(lambda w, x: loss(module, w, x))):
        calls = [
            len(count(vmap(function), {n: w[:members] for n, w in weights.items()}, x[:members]).names)
            for members in (2, SAMPLES)
        ]
        assert calls[0] == calls[1]


# --------------------------------------------------------------------------- gradients of each sample


@kinds
@pytest.mark.parametrize("options", [{}, DEEP], ids=["plain", "deep"])
def test_gradients_of_each_sample(kind, options):
    if kind.is_cell and options:
        options = {"bias": False}
    module = make(kind, **options)
    weights, samples = weights_of(module), make_samples(module)
    everything = tuple(range(1 + len(samples)))
    function = grad(lambda w, *t: loss(module, w, *t), everything)
    for dims in which_are_mapped(kind):
        tensors = [t if dim == 0 else t[0] for t, dim in zip(samples, dims, strict=True)]
        dims = (None, *dims)
        assert_close(vmap(function, dims)(weights, *tensors), looped(function, dims, weights, *tensors))


@kinds
def test_gradients_of_each_sample_do_not_loop(kind):
    module = make(kind)
    weights, x = weights_of(module), make_samples(module)[0]
    function = vmap(grad(lambda w, x: loss(module, w, x)), (None, 0))
    calls = [len(count(function, weights, x[:samples]).names) for samples in (2, SAMPLES)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not LSTM_PROJ], ids=str)
def test_gradients_of_each_sample_are_one_call_of_the_kernels(kind):
    """But with a projection: there in plain PyTorch, batched over the samples."""
    module = make(kind)
    weights, x = weights_of(module), make_samples(module)[0]
    calls = count(vmap(grad(lambda w, x: loss(module, w, x)), (None, 0)), weights, x)
    assert calls.of("fused_rnn.") == 2 and calls.of("fused_rnn.layer_gate_gradients") == 1


@layers
def test_gradients_of_each_packed_sample(kind):
    module = make(kind, bidirectional=True)
    weights, batch_sizes = weights_of(module), torch.tensor([3, 2, 2, 1])
    rows = torch.randn(SAMPLES, 8, 4, dtype=torch.float64)
    function = grad(lambda w, rows: loss(module, w, PackedSequence(rows, batch_sizes)))
    assert_close(vmap(function, (None, 0))(weights, rows), looped(function, (None, 0), weights, rows))


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_each_sample_in_few_bits(kind, dtype):
    """Added up they are the gradient of the sum, to a few roundings."""
    module = make(kind, dtype=dtype)
    weights, x = weights_of(module), make_samples(module)[0]
    function = grad(lambda w, x: sum(out.float().pow(2).sum() for out in call(module, w, x)))
    found = vmap(function, (None, 0))(weights, x)
    expected = looped(function, (None, 0), weights, x)
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


@classes
def test_jacobian_of_each_sample(kind):
    """Two mapped dimensions: jacrev's own, of the outputs, and that of the samples."""
    module = make(kind)
    weights, x = weights_of(module), make_samples(module)[0]

    def outputs(w, x):
        return call(module, w, x)[0].sum(-1)

    function = jacrev(outputs, (0, 1))
    assert_close(vmap(function, (None, 0))(weights, x), looped(function, (None, 0), weights, x))
    nested = vmap(vmap(grad(lambda w, x: loss(module, w, x)), (None, 0)), (None, 0))(
        weights, torch.stack([x, x + 1])
    )
    expected = [looped(grad(lambda w, x: loss(module, w, x)), (None, 0), weights, y) for y in (x, x + 1)]
    for k in range(2):
        assert_close({name: value[k] for name, value in nested.items()}, expected[k])
