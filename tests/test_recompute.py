"""`recompute=True`: the same gradients bit for bit from much less that is kept. Checkpointing, the same with any
module's tools: test_checkpoint.py.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from parity import (
    GRU,
    LAYERS,
    LSTM,
    LSTM_PROJ,
    assert_equal,
    make_input,
    make_state,
    make_twins,
    pack,
    run,
    tensors_of,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_rnn

layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
VARIANTS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "batch_first": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


def with_and_without(kind, **options) -> tuple[nn.Module, nn.Module]:
    plain = make_twins(kind, 5, 19, **options).ours
    recomputing = copy.deepcopy(plain)
    recomputing.recompute = True
    return plain, recomputing


def leaves(module: nn.Module, steps: int = 6):
    x, hx = make_input(module, steps).requires_grad_(), make_state(module)
    for state in tensors_of(hx):
        state.requires_grad_()
    return x, hx


def kept(call) -> dict[int, int]:
    """Bytes of every storage that a forward pass keeps, by its address."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return {address: size for address, size in storages.items() if size}


# ------------------------------------------------------------------------------------------------ same numbers


@layers
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_bit_changes(kind, options, packed):
    plain, recomputing = with_and_without(kind, **options)
    x, hx = leaves(plain)
    form = pack([3, 6, 4], batch_first=plain.batch_first) if packed else lambda x: x
    assert_equal(run(recomputing, x, hx, form=form), run(plain, x, hx, form=form))


@layers
def test_no_bit_changes_on_any_backend(kind, backend):
    plain, recomputing = with_and_without(kind, device=backend, bidirectional=True)
    x, hx = leaves(plain)
    assert_equal(run(recomputing, x, hx), run(plain, x, hx))


@layers
def test_no_bit_changes_with_threads_and_dropout(kind):
    torch.set_num_threads(2)
    twins = make_twins(kind, 40, 96, num_layers=2, dropout=0.5)
    plain, recomputing = twins.ours, copy.deepcopy(twins.ours)
    recomputing.recompute = True
    x = torch.randn(12, 24, 40).requires_grad_()

    def seeded(module):
        torch.manual_seed(3)
        return run(module, x)

    assert_equal(seeded(recomputing), seeded(plain))


@layers
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias", "x"])
def test_no_bit_changes_with_frozen_parts(kind, frozen):
    """The input is needed again, whoever asks for its gradient."""
    plain, recomputing = with_and_without(kind)
    x, hx = leaves(plain)
    x.requires_grad_(frozen not in ("x", "weight_ih"))
    for module in (plain, recomputing):
        for name, weight in module.named_parameters():
            weight.requires_grad_(frozen not in name)
    assert_equal(run(recomputing, x, hx), run(plain, x, hx))


@layers
def test_second_derivative(kind):
    plain, recomputing = with_and_without(kind, dtype=torch.float64)
    x, hx = leaves(plain)

    def penalty(module) -> list[Tensor]:
        loss = sum(out.pow(2).sum() for out in tensors_of(module(x, hx)))
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *module.parameters()])
        return [g.detach() for g in (*first, *second)]

    for found, expected in zip(penalty(recomputing), penalty(plain), strict=True):
        assert torch.equal(found, expected)


@layers
def test_backward_twice(kind):
    plain, recomputing = with_and_without(kind)
    x, _ = leaves(plain)
    gradients = []
    loss = tensors_of(recomputing(x))[0].pow(2).sum()
    for _ in range(2):
        gradients.append(torch.autograd.grad(loss, [x, *recomputing.parameters()], retain_graph=True))
    expected = torch.autograd.grad(tensors_of(plain(x))[0].pow(2).sum(), [x, *plain.parameters()])
    for found in gradients:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [GRU, LSTM, LSTM_PROJ], ids=str)
def test_an_edit_in_between_raises(kind):
    """What is computed again must be what was. (The RNN keeps no gates, and computes nothing again.)"""
    _, recomputing = with_and_without(kind)
    recomputing.requires_grad_(False).bias_ih_l0.requires_grad_()
    x = make_input(recomputing)
    loss = tensors_of(recomputing(x))[0].sum()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------ memory


@layers
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_is_kept(kind, packed):
    """Input, output, weights and initial states: to the byte, and nothing else."""
    plain, recomputing = with_and_without(kind, bidirectional=True)
    x, hx = leaves(plain)
    rows = pack([6, 6, 6], enforce_sorted=True)(x) if packed else x
    output = tensors_of(recomputing(rows, hx))[0]
    needed = sum(t.nbytes for t in (x, output, *tensors_of(hx), *recomputing.parameters()))
    without, with_ = (kept(lambda module=module: module(rows, hx)) for module in (plain, recomputing))
    assert sum(with_.values()) == needed
    gates = {"rnn": 0, "gru": 4, "lstm": 5}[kind.cls.lower()] * 2 * 6 * 3 * 19 * 4
    assert sum(without.values()) == needed + gates


@pytest.mark.parametrize("kind", [GRU, LSTM, LSTM_PROJ], ids=str)
def test_gates_live_for_one_layer_at_a_time(kind):
    """In the backward pass of a stack they are there again for one layer, and gone before the next."""
    alive: list[StorageWeakRef] = []
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            result = function(*args, **(kwargs or {}))
            if str(function) == "fused_rnn.layer_forward.default":
                alive.append(StorageWeakRef(result[3].untyped_storage()))
                most = max(most, sum(not storage.expired() for storage in alive))
            return result

    _, recomputing = with_and_without(kind, num_layers=6)
    loss = tensors_of(recomputing(make_input(recomputing)))[0].sum()
    with Watch():
        loss.backward()
    assert len(alive) == 6 and most == 1


# -------------------------------------------------------------------------------------------------- the switch


@layers
def test_the_switch(kind):
    """By keyword or later; it survives what modules go through, and is no part of their state."""
    made = kind.ours(3, 7, recompute=True, **kind.options)
    assert made.recompute and "recompute=True" in repr(made)
    assert pickle.loads(pickle.dumps(made)).recompute and copy.deepcopy(made).recompute
    plain = make_twins(kind).ours
    assert not plain.recompute and repr(plain) == repr(make_twins(kind).theirs)
    assert made.state_dict().keys() == plain.state_dict().keys()
    converted = fused_rnn.convert(make_twins(kind).theirs)
    assert not converted.recompute
    converted.recompute = True
    x = make_input(converted)
    assert sum(kept(lambda: converted(x)).values()) <= sum(kept(lambda: plain(x)).values())
    with pytest.raises(TypeError):
        kind.ours(3, 4, 1, *([False] * 12))  # by keyword only


@layers
def test_a_pickle_from_before(kind):
    plain = make_twins(kind).ours
    state = {name: value for name, value in plain.__dict__.items() if name != "recompute"}
    old = kind.ours.__new__(kind.ours)
    old.__setstate__(state)
    assert old.recompute is False
    x = make_input(plain)
    assert_equal(run(old, x), run(plain, x))


@layers
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpoint_of_a_layer(kind, recompute):
    """Either kind of recomputation inside the other: nothing but the input is kept, and no bit changes."""
    plain, recomputing = with_and_without(kind)
    module = recomputing if recompute else plain
    x, _ = leaves(plain)

    def call(x):
        return checkpoint(module, x, use_reentrant=False)

    assert_equal(run(module, x, call=call), run(plain, x))
    assert sum(kept(lambda: call(x)).values()) <= x.nbytes
