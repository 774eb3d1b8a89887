"""State dicts both ways, pickles new and old, copies, torch.save and torch.load."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from parity import CLASSES, GRU, KINDS, LAYERS, LSTM, LSTM_PROJ, RNN, make_input, make_twins, run, tensors_of
from torch import nn

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)

OPTIONS = {"num_layers": 2, "bidirectional": True}


def make_ours(kind, **options) -> nn.Module:
    return make_twins(kind, **({} if kind.is_cell else OPTIONS), **options).ours


def assert_same_module(mine: nn.Module, other: nn.Module) -> None:
    """The same class, settings and values, no shared storage, and bit for bit the same results."""
    assert type(mine) is type(other) and repr(mine) == repr(other) and mine.training == other.training
    for (name, a), (its_name, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        assert name == its_name and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    x = make_input(mine)
    for name, value in run(mine, x).items():
        assert torch.equal(value, run(other, x)[name]), name


def round_trip(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(round_trip, id="torch.save")]
WAYS += [
    pytest.param(
        lambda module, p=protocol: pickle.loads(pickle.dumps(module, protocol=p)), id=f"pickle-{protocol}"
    )
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
]


# ----------------------------------------------------------------------------------------------------- copies


@kinds
@pytest.mark.parametrize("copied", WAYS)
def test_copies(kind, copied):
    ours = make_ours(kind, dtype=torch.float64)
    ours.eval()
    next(ours.parameters()).requires_grad_(False)
    assert_same_module(copied(ours), ours)


@kinds
@pytest.mark.parametrize("copied", WAYS)
def test_copies_of_a_used_module(kind, copied):
    """After a backward pass, which leaves gradients behind, and for the layers whatever a call may cache."""
    ours = make_ours(kind)
    sum(out.sum() for out in tensors_of(ours(make_input(ours)))).backward()
    assert_same_module(copied(ours), ours)


@kinds
@pytest.mark.parametrize("copied", WAYS)
def test_a_copy_lives_on_its_own(kind, copied):
    ours = make_ours(kind)
    x = make_input(ours)
    before = tensors_of(ours(x))
    other = copied(ours)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(other(x)), before, strict=True))
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert not any(torch.equal(a, b) for a, b in zip(tensors_of(other(x)), before, strict=True))


@kinds
def test_a_shallow_copy_shares_its_parameters(kind):
    ours = make_ours(kind)
    other = copy.copy(ours)
    assert [id(p) for p in other.parameters()] == [id(p) for p in ours.parameters()]
    assert_equal_results(other, ours)


def assert_equal_results(mine: nn.Module, other: nn.Module) -> None:
    x = make_input(mine)
    for a, b in zip(tensors_of(mine(x)), tensors_of(other(x)), strict=True):
        assert torch.equal(a, b)


@classes
def test_copies_inside_a_model(kind):
    """Attributes of one's own, hooks, and a module that is in the model twice."""
    ours = make_ours(kind)
    model = nn.ModuleDict({"a": ours, "b": nn.Linear(2, 2), "again": ours})
    model.note = {"of": "my own"}
    other = copy.deepcopy(model)
    assert other["a"] is other["again"] and other["a"] is not ours and other.note == {"of": "my own"}
    assert_same_module(other["a"], ours)


@classes
def test_pickles_hold_nothing_of_a_call(kind):
    """Whatever is cached is left out: the size does not grow with use."""
    ours = make_ours(kind)
    fresh = len(pickle.dumps(ours))
    for batch in (1, 5):
        with torch.no_grad():
            ours(make_input(ours, batch=batch))
    assert len(pickle.dumps(ours)) == fresh


@classes
def test_a_module_dies_when_it_is_let_go(kind):
    """No registry, cache or cycle keeps it, nor its weights."""
    ours = make_ours(kind)
    sum(out.sum() for out in tensors_of(ours(make_input(ours)))).backward()
    module, weight = weakref.ref(ours), weakref.ref(next(ours.parameters()))
    del ours
    assert module() is None and weight() is None


# ------------------------------------------------------------------------------------------------ state dicts


@kinds
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no bias"])
def test_state_dict_loads_both_ways(kind, options):
    options = options if kind.is_cell else {**OPTIONS, **options}
    ours, theirs = kind.ours(5, 7, **kind.options, **options), kind.theirs(5, 7, **kind.options, **options)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert ours.state_dict()._metadata == state._metadata
    assert str(ours.load_state_dict(state)) == "<All keys matched successfully>"
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name]) and weight.data_ptr() != state[name].data_ptr()
    ours.reset_parameters()
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name])


@kinds
def test_state_dict_through_a_file(kind):
    ours, other = make_ours(kind), make_ours(kind, seed=9)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_module(other, ours)


@kinds
def test_loaded_weights_are_the_ones_used(kind):
    """Loaded after a call, in place: a packing of weights kept from the call before would be stale."""
    ours, other = make_ours(kind), make_ours(kind, seed=9)
    x = make_input(ours)
    ours(x), other(x)
    other.load_state_dict(ours.state_dict())
    assert_equal_results(other, ours)


@kinds
@pytest.mark.parametrize("strict", [True, False])
def test_wrong_state_dicts(kind, strict):
    """The same report, or the same error."""
    twins = make_twins(kind)
    state = twins.theirs.state_dict()
    names = list(state)
    wrongs = [
        OrderedDict(list(state.items())[1:]),
        OrderedDict([*state.items(), ("more", torch.zeros(1))]),
        OrderedDict((name, weight[:-1]) for name, weight in state.items()),
        OrderedDict((name, weight if name != names[0] else None) for name, weight in state.items()),
    ]

    def outcome(module, wrong):
        try:
            return str(module.load_state_dict(wrong, strict=strict))
        except Exception as error:
            return type(error), str(error)

    for wrong in wrongs:
        assert outcome(twins.ours, wrong) == outcome(twins.theirs, wrong)


@kinds
def test_state_dict_of_a_nested_model(kind):
    ours = nn.Sequential(OrderedDict(encoder=kind.ours(5, 7, **kind.options), head=nn.Linear(7, 2)))
    theirs = nn.Sequential(OrderedDict(encoder=kind.theirs(5, 7, **kind.options), head=nn.Linear(7, 2)))
    assert list(ours.state_dict(prefix="p.")) == list(theirs.state_dict(prefix="p."))
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ old pickles


def setstate(cls: type[nn.Module], state: dict) -> nn.Module:
    module = cls.__new__(cls)
    module.__setstate__(state)
    return module


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_getstate_holds_no_weak_references(kind):
    state = make_ours(kind).__getstate__()
    assert "_flat_weight_refs" not in state
    assert set(state) == set(make_twins(kind, **OPTIONS).theirs.__getstate__())


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_pickles_from_before_projections(kind):
    """Pickled before torch 1.8: no proj_size."""
    ours = make_ours(kind)
    state = ours.__getstate__()
    del state["proj_size"]
    other = setstate(kind.ours, state)
    assert other.proj_size == 0
    assert_equal_results(other, ours)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_pickles_from_before_weight_names(kind, bias):
    """Older still: `all_weights` held the tensors themselves."""
    if kind is LSTM_PROJ and not bias:
        bias = True  # torch's own __setstate__ cannot read that one
    ours = make_ours(kind, bias=bias)

    def old(module):
        state = module.__getstate__()
        state["all_weights"] = module.all_weights
        for name in ("_all_weights", "_flat_weights_names", "_flat_weights"):
            del state[name]
        return state

    other = setstate(kind.ours, old(ours))
    expected = setstate(kind.theirs, old(make_twins(kind, bias=bias, **OPTIONS).theirs))
    assert other._all_weights == expected._all_weights
    assert other._flat_weights_names == expected._flat_weights_names
    assert_equal_results(other, ours)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ], ids=str)
def test_states_of_torchs_modules_may_be_taken_over(kind):
    """What torch.nn pickled is what ours is made of."""
    twins = make_twins(kind, **OPTIONS)
    assert_equal_results(setstate(kind.ours, copy.deepcopy(twins.theirs).__getstate__()), twins.ours)
