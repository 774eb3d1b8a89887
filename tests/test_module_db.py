"""torch's own database of module tests, run against our classes: every entry, every sample, nothing expected
to fail.

`torch.testing._internal.common_modules.module_db` describes each class of torch.nn: arguments to construct it
with, inputs, a reference to compare with, calls that must raise. torch's test/test_modules.py runs them; what
is below are those of its tests that concern recurrent layers, with our class constructed in the place of
torch's.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import sys
import types
import unittest
from collections.abc import Callable, Iterator

import pytest
import torch
from parity import CLASSES, tensors_of
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

if not importlib.util.find_spec("expecttest"):
    # torch.testing derives a class from one of it, which nothing here uses: a machine without it can run this too
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)

from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch.testing._internal.common_utils import freeze_rng_state, gradcheck, gradgradcheck

ENTRIES: dict[type, ModuleInfo] = {info.module_cls: info for info in module_db}
OURS = {kind.theirs: kind.ours for kind in CLASSES}

entries = pytest.mark.parametrize("theirs", OURS, ids=lambda cls: cls.__name__)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def assert_close(actual, expected, **tolerance) -> None:
    """With the tolerance of torch's TestModule, unless told."""
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


def samples(
    theirs: type, device: str, dtype: torch.dtype, training: bool, requires_grad: bool
) -> list[ModuleInput]:
    info = ENTRIES[theirs]
    assert dtype in info.supported_dtypes(torch.device(device).type)
    found = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    )
    assert len(found) > 1 and all(sample.forward_input is not None for sample in found)
    return list(found)


def build(theirs: type, sample: ModuleInput, device: str, dtype: torch.dtype, training: bool) -> nn.Module:
    given = sample.constructor_input
    return OURS[theirs](*given.args, **given.kwargs).to(device).to(dtype).train(training)


def built(
    theirs: type, device: str, dtype: torch.dtype, training: bool, *, requires_grad: bool = False
) -> Iterator[tuple[nn.Module, tuple, dict, ModuleInput]]:
    """Each sample's module, and what to call it with."""
    for sample in samples(theirs, device, dtype, training, requires_grad):
        with freeze_rng_state():
            module = build(theirs, sample, device, dtype, training)
        yield module, sample.forward_input.args, sample.forward_input.kwargs, sample


def test_the_database_has_all_six():
    assert len(OURS) == 6 and set(OURS) <= set(ENTRIES)


@entries
@dtypes
@modes
def test_forward(theirs, dtype, training, backend):
    """Against the entry's reference function; then again after a conversion by method."""
    compared = 0
    for module, args, kwargs, sample in built(theirs, backend, dtype, training):
        with freeze_rng_state():
            outputs = module(*args, **kwargs)
            assert_close(outputs, sample.reference_fn(module, *args, **kwargs))
            compared += 1
            module.float() if dtype == torch.float32 else module.double()
            assert_close(module(*args, **kwargs), outputs)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(backend, dtype)}
    assert compared > 1


@entries
@dtypes
@modes
def test_forward_is_torchs(theirs, dtype, training, backend):
    """Not among torch's tests: the same weights in torch's class, the same sample."""
    for module, args, kwargs, sample in built(theirs, backend, dtype, training):
        given = sample.constructor_input
        reference = theirs(*given.args, **given.kwargs).to(backend).to(dtype).train(training)
        reference.load_state_dict(module.state_dict())
        assert_close(module(*args, **kwargs), reference(*args, **kwargs))


@entries
@dtypes
@modes
def test_factory_kwargs(theirs, dtype, training, device):
    for sample in samples(theirs, device, dtype, training, False):
        given = sample.constructor_input
        module = OURS[theirs](*given.args, **given.kwargs, device=device, dtype=dtype).train(training)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}


@entries
@dtypes
@modes
def test_repr(theirs, dtype, training, device):
    for module, _, _, sample in built(theirs, device, dtype, training):
        given = sample.constructor_input
        assert repr(module) == str(module) == repr(theirs(*given.args, **given.kwargs))


@entries
@dtypes
@modes
def test_save_and_load(theirs, dtype, training, device):
    for module, args, kwargs, _ in built(theirs, device, dtype, training):
        with freeze_rng_state():
            expected = module(*args, **kwargs)
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            assert_close(torch.load(buffer, weights_only=False)(*args, **kwargs), expected, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- not contiguous


def not_contiguous(obj):
    """Every other element of a tensor of twice the size, as a leaf of its own."""

    def spread(tensor: Tensor) -> Tensor:
        wide = torch.repeat_interleave(tensor, 2, dim=-1)[..., ::2].detach()
        return wide.requires_grad_(tensor.requires_grad)

    return tree_map(lambda leaf: spread(leaf) if isinstance(leaf, Tensor) else leaf, obj)


def outputs_and_grads(module: nn.Module, args: tuple, kwargs: dict, grad_outputs: list[Tensor]):
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    for leaf in (*leaves, *module.parameters()):
        leaf.grad = None
    outputs = tensors_of(module(*args, **kwargs))
    for output, grad in zip(outputs, grad_outputs, strict=True):
        output.backward(grad, retain_graph=True)
    return (
        outputs,
        [leaf.grad.clone() for leaf in leaves],
        [weight.grad.clone() for weight in module.parameters()],
    )


@entries
@dtypes
@modes
def test_non_contiguous_tensors(theirs, dtype, training, backend):
    """Inputs, incoming gradients, both and neither."""
    for module, args, kwargs, _ in built(theirs, backend, dtype, training, requires_grad=True):
        grads = [torch.randn_like(output) for output in tensors_of(module(*args, **kwargs))]
        expected = outputs_and_grads(module, args, kwargs, grads)
        inputs = [(args, kwargs), not_contiguous((args, kwargs))]
        assert not all(leaf.is_contiguous() for leaf in tree_flatten(inputs[1])[0])
        for (new_args, new_kwargs), new_grads in itertools.product(inputs, [grads, not_contiguous(grads)]):
            outputs, input_grads, weight_grads = outputs_and_grads(module, new_args, new_kwargs, new_grads)
            assert_close(outputs, expected[0])
            assert_close(input_grads, expected[1], rtol=0, atol=1e-4)
            assert_close(weight_grads, expected[2])


@entries
@dtypes
@modes
def test_memory_format(theirs, dtype, training, device):
    """Results and gradients are contiguous, in whichever format the module was put."""
    for module, args, kwargs, _ in built(theirs, device, dtype, training, requires_grad=True):
        leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)] + list(
            module.parameters()
        )
        grads, expected = None, None
        for memory_format in (torch.preserve_format, torch.contiguous_format):
            module.to(memory_format=memory_format)
            outputs = tensors_of(module(*args, **kwargs))
            grads = grads or [torch.rand_like(output) for output in outputs]
            found = torch.autograd.grad(outputs, leaves, grads)
            assert all(tensor.is_contiguous() for tensor in (*outputs, *found))
            expected = expected or (outputs, found)
            assert_close((outputs, found), expected)


# -------------------------------------------------------------------------------------------------- gradients


def check_derivatives(
    theirs: type, training: bool, device: str, check: Callable[..., bool], every: int
) -> None:
    """Of everything together; then of the inputs with one parameter, all others frozen, for one parameter in
    `every`: the first sample starts from the first parameter, the next from the second: all get their turn.
    """
    for turn, (module, args, kwargs, _) in enumerate(
        built(theirs, device, torch.float64, training, requires_grad=True)
    ):
        parameters = tuple(module.parameters())
        flat, spec = tree_flatten((args, kwargs, parameters))

        def function(*flat, module=module, spec=spec):
            args, kwargs, _ = tree_unflatten(flat, spec)
            with freeze_rng_state():
                return tensors_of(module(*args, **kwargs))

        assert check(function, flat)
        module.requires_grad_(False)
        for parameter in parameters[turn % every :: every]:
            parameter.requires_grad_(True)
            assert check(function, flat)
            parameter.requires_grad_(False)


@entries
@modes
def test_grad(theirs, training, backend):
    """torch's gradcheck: finite differences, and the backward pass under vmap."""
    check_derivatives(theirs, training, backend, gradcheck, every=3)


@entries
@modes
def test_gradgrad(theirs, training, device):
    check_derivatives(theirs, training, device, gradgradcheck, every=5 if training else 16)


# --------------------------------------------------------------------------------------------------- the rest


@entries
@dtypes
def test_if_train_and_eval_modes_differ(theirs, dtype, device):
    """A class said to behave alike in both must not so much as look at the flag."""
    for module, args, kwargs, _ in built(theirs, device, dtype, True):
        del module.training
        if ENTRIES[theirs].train_and_eval_differ:
            with pytest.raises(AttributeError, match="training"):
                module(*args, **kwargs)
        else:
            module(*args, **kwargs)


@entries
@dtypes
@modes
def test_device_context(theirs, dtype, training):
    for sample in samples(theirs, "cpu", dtype, training, False):
        given = sample.constructor_input
        module = OURS[theirs](*given.args, **given.kwargs)
        with torch.device("meta"):
            meta = OURS[theirs](*given.args, **given.kwargs)
        for mine, its in zip(meta.parameters(), module.parameters(), strict=True):
            assert mine.is_meta and mine.shape == its.shape and mine.stride() == its.stride()
            assert mine.dtype == its.dtype and mine.requires_grad == its.requires_grad


@entries
@dtypes
@modes
def test_errors(theirs, dtype, training, device):
    info = ENTRIES[theirs]
    errors = info.module_error_inputs_func(
        info, device=device, dtype=dtype, requires_grad=False, training=training
    )
    assert errors
    for error in errors:
        given, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[theirs](*given.args, **given.kwargs)
        else:
            module = OURS[theirs](*given.args, **given.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*forward.args, **forward.kwargs)


@pytest.mark.cuda
@entries
@dtypes
@modes
def test_device_transfer(theirs, dtype, training):
    """CPU to GPU and back, and the same results on both, gradients too."""
    for module, args, kwargs, _ in built(theirs, "cpu", dtype, training, requires_grad=True):
        grads = [torch.randn_like(output) for output in tensors_of(module(*args, **kwargs))]
        expected = outputs_and_grads(module, args, kwargs, grads)
        moved = copy.deepcopy(module).cuda()

        def to_cuda(obj):
            leaf = lambda t: t.detach().cuda().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t  # noqa: E731
            return tree_map(leaf, obj)

        found = outputs_and_grads(moved, to_cuda(args), to_cuda(kwargs), to_cuda(grads))
        tolerance = {"rtol": 0, "atol": 4e-4 if dtype == torch.float64 else 5e-2}  # torch's
        assert_close(tree_map(Tensor.cpu, found), expected, **tolerance)
        assert_close(tensors_of(moved.cpu()(*args, **kwargs)), expected[0])
