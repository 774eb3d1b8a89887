"""What torch can be asked to do with a module of torch.nn's, asked of ours: function transforms, tensors
without data, replicas, tracing, threads. Only what works with torch.nn's class of the same name; there the
results are compared.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from parity import (
    CELLS,
    CLASSES,
    GRU_CELL,
    KINDS,
    LAYERS,
    LSTM,
    RNN_CELL,
    make_input,
    make_twins,
    pack,
    run,
    tensors_of,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

# torch's own remarks, about itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:The tensor attributes? self._flat_weights"),
]

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
cells = pytest.mark.parametrize("kind", CELLS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def first(result) -> Tensor:
    return tensors_of(result)[0]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def loss_of(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return sum(out.pow(2).sum() for out in tensors_of(functional_call(module, weights, (x,))))


# ------------------------------------------------------------------------------------ derivatives by function

TRANSFORMS = {
    "grad of weights": lambda m, x: grad(lambda w: loss_of(m, w, x))(weights_of(m)),
    "grad of input": lambda m, x: grad(lambda x: loss_of(m, weights_of(m), x))(x),
    "grad of grad": lambda m, x: grad(
        lambda w: sum(g.pow(2).sum() for g in grad(lambda w: loss_of(m, w, x))(w).values())
    )(weights_of(m)),
    "vjp": lambda m, x: vjp(lambda x: first(m(x)), x)[1](torch.ones_like(first(m(x)))),
    "jvp of input": lambda m, x: jvp(lambda x: first(m(x)), (x,), (x.cos(),)),
    "jvp of weights": lambda m, x: jvp(
        lambda w: loss_of(m, w, x), (weights_of(m),), ({n: w.cos() for n, w in weights_of(m).items()},)
    ),
    "jacrev": lambda m, x: jacrev(lambda x: first(m(x)))(x),
    "jacfwd": lambda m, x: jacfwd(lambda x: first(m(x)))(x),
    "hessian": lambda m, x: hessian(lambda x: loss_of(m, weights_of(m), x))(x),
    "jacobian": lambda m, x: torch.autograd.functional.jacobian(lambda x: first(m(x)), x, vectorize=True),
    "functional hessian": lambda m, x: torch.autograd.functional.hessian(
        lambda x: loss_of(m, weights_of(m), x), x
    ),
}


@kinds
@pytest.mark.parametrize("which", TRANSFORMS)
def test_function_transforms(kind, which):
    twins = make_twins(kind, 2, 4, dtype=torch.float64)
    x = make_input(twins.ours, 3, 2)
    assert_close(TRANSFORMS[which](twins.ours, x), TRANSFORMS[which](twins.theirs, x))


@layers
@pytest.mark.parametrize("which", ["grad of weights", "grad of input", "jvp of input", "jacrev"])
def test_function_transforms_of_deep_layers(kind, which):
    twins = make_twins(kind, 2, 4, dtype=torch.float64, num_layers=2, bidirectional=True, batch_first=True)
    x = make_input(twins.ours, 3, 2)
    assert_close(TRANSFORMS[which](twins.ours, x), TRANSFORMS[which](twins.theirs, x))


@layers
def test_grad_of_packed_input(kind):
    """Of the packed rows. torch.nn cannot: ours is held to what its own backward pass gives."""
    ours = make_twins(kind, 2, 4, dtype=torch.float64).ours
    rows, batch_sizes = torch.randn(5, 2, dtype=torch.float64), torch.tensor([2, 2, 1])

    def loss(rows: Tensor) -> Tensor:
        return first(ours(PackedSequence(rows, batch_sizes))).pow(2).sum()

    leaf = rows.clone().requires_grad_()
    assert_close(grad(loss)(rows), torch.autograd.grad(loss(leaf), leaf)[0])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_mode(kind, dtype):
    """Dual numbers. torch.nn's float32 LSTM cannot, in oneDNN; through its own code it can, and ours must."""
    twins = make_twins(kind, dtype=dtype)
    x, tangent = make_input(twins.ours), make_input(twins.ours)

    def tangents(module):
        with fwAD.dual_level():
            outputs = tensors_of(module(fwAD.make_dual(x, tangent)))
            return [fwAD.unpack_dual(out).tangent for out in outputs]

    with torch.backends.mkldnn.flags(enabled=False):
        expected = tangents(twins.theirs)
    found = tangents(twins.ours)
    assert all(isinstance(t, Tensor) for t in found)
    torch.testing.assert_close(found, expected)


@kinds
def test_batched_gradients(kind):
    """`is_grads_batched`: the backward pass under vmap."""
    twins = make_twins(kind, dtype=torch.float64)
    x = make_input(twins.ours).requires_grad_()
    incoming = torch.randn(5, *first(twins.ours(x)).shape, dtype=torch.float64)

    def gradients(module):
        return torch.autograd.grad(
            first(module(x)), (x, *module.parameters()), incoming, is_grads_batched=True
        )

    assert_close(gradients(twins.ours), gradients(twins.theirs))


# ------------------------------------------------------------------------------------------------- vectorised


@pytest.mark.parametrize("kind", [GRU_CELL, RNN_CELL, CELLS[1]], ids=str)
def test_vmap_over_inputs(kind):
    twins = make_twins(kind, dtype=torch.float64)
    x, h = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)

    def mapped(module):
        return vmap(module)(x, h), vmap(module, (0, None))(x, h[0]), vmap(module, (None, 0))(x[0], h)

    assert_close(mapped(twins.ours), mapped(twins.theirs))
    with torch.no_grad():
        assert_close(mapped(twins.ours), mapped(twins.theirs))


@pytest.mark.parametrize("kind", [GRU_CELL, RNN_CELL, CELLS[1]], ids=str)
def test_vmap_over_an_ensemble(kind):
    twins = [make_twins(kind, seed=seed, dtype=torch.float64) for seed in range(3)]
    x = make_input(twins[0].ours)
    weights, _ = stack_module_state([t.ours for t in twins])
    found = vmap(lambda w: functional_call(twins[0].ours, w, (x,)))(weights)
    assert_close(found, torch.stack([t.theirs(x) for t in twins]))


@classes
def test_vmap_over_layers_too(kind):
    """torch.nn has no batching rule for most of these; ours are held to their own results, one by one."""
    ours = make_twins(kind, dtype=torch.float64).ours
    x = torch.stack([make_input(ours) for _ in range(3)])
    found = vmap(lambda x: tuple(tensors_of(ours(x))))(x)
    for k in range(3):
        assert_close([out[k] for out in found], tensors_of(ours(x[k])))


@pytest.mark.parametrize("kind", [LSTM], ids=str)
def test_gradient_of_each_sample(kind):
    """torch.nn's float32 LSTM does this, through its fallback; no other class of torch.nn's does."""
    twins = make_twins(kind)
    x = make_input(twins.ours, 4, 3)

    def per_sample(module):
        return vmap(grad(lambda w, x: loss_of(module, w, x[:, None])), (None, 1))(weights_of(module), x)

    torch.testing.assert_close(per_sample(twins.ours), per_sample(twins.theirs))


@layers
@pytest.mark.parametrize("form", ["padded", "batch_first", "packed"])
def test_expanded_weights(kind, form):
    """The older way to the gradient of each sample: weights of a class that knows operators of torch's alone."""
    batch_first = form == "batch_first"
    twins = make_twins(kind, dtype=torch.float64, num_layers=2, batch_first=batch_first)
    x = make_input(twins.ours, 4, 3).requires_grad_()

    def per_sample(module):
        given = pack([4, 2, 2], enforce_sorted=True)(x) if form == "packed" else x
        result = call_for_per_sample_grads(module, batch_size=3, batch_first=batch_first)(given)
        sum(out.sum() for out in tensors_of(result)).backward()
        return [weight.grad_sample for weight in module.parameters()]

    assert_close(per_sample(twins.ours), per_sample(twins.theirs))


# ---------------------------------------------------------------------------------------- seen from elsewhere


@kinds
def test_replicas(kind):
    """What DataParallel does: a shallow copy whose parameters are replaced by tensors that have a history."""
    twins = make_twins(kind, dtype=torch.float64)
    x = make_input(twins.ours)

    def gradients(module):
        replica = module._replicate_for_data_parallel()
        for name, weight in module.named_parameters():
            setattr(replica, name, weight * 1)
        sum(out.pow(2).sum() for out in tensors_of(replica(x))).backward()
        assert replica is not module and not list(replica.parameters())
        if not kind.is_cell:
            assert replica._flat_weights is not module._flat_weights
            assert [
                w is getattr(module, n)
                for w, n in zip(module._flat_weights, module._flat_weights_names, strict=True)
            ]
        return [weight.grad for weight in module.parameters()]

    assert_close(gradients(twins.ours), gradients(twins.theirs))


@kinds
def test_threads_of_python(kind):
    """One module called from several threads at once gives the results of calls in turn."""
    ours = make_twins(kind, 6, 20).ours
    inputs = [make_input(ours, 9, 4).requires_grad_() for _ in range(6)]
    expected = [run(ours, x) for x in inputs]
    found: list = [None] * len(inputs)

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = run(ours, inputs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, its in zip(found, expected, strict=True):
        assert mine is not None and all(torch.equal(mine[name], value) for name, value in its.items())


@kinds
def test_tensor_subclasses(kind):
    class Tagged(Tensor):
        pass

    twins = make_twins(kind)
    x = make_input(twins.ours).as_subclass(Tagged)
    mine, its = tensors_of(twins.ours(x)), tensors_of(twins.theirs(x))
    assert [type(t) for t in mine] == [type(t) for t in its]
    torch.testing.assert_close([t.as_subclass(Tensor) for t in mine], [t.as_subclass(Tensor) for t in its])


@kinds
def test_dispatch_modes(kind):
    """A mode that watches every operation, as memory trackers do, sees ours and changes nothing."""

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    ours = make_twins(kind).ours
    x = make_input(ours)
    expected = run(ours, x)
    with Watch() as watch:
        found = run(ours, x)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(name.startswith("fused_rnn") for name in watch.seen)


@kinds
def test_module_hooks(kind):
    ours = make_twins(kind).ours
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, result: seen.append("after"))
    ours.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    x = make_input(ours).requires_grad_()
    first(ours(x)).sum().backward()
    assert seen == ["before", "after", "backward"]


@kinds
def test_global_modes_of_gradients(kind):
    ours = make_twins(kind).ours
    x = make_input(ours)
    with torch.autograd.set_detect_anomaly(True):
        first(ours(x)).sum().backward()
    with torch.autograd.profiler.profile() as profile:
        ours(x)
    assert len(profile.function_events) > 0
