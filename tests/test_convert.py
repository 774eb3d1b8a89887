"""convert and revert: the class changes, nothing else does.

A converted layer is compared with the layer it was: same object, same parameters, same `state_dict`;
outputs and gradients under the tolerance law.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import types
from functools import partial

import parity
import pytest
import torch
from parity import CLASSES, KINDS, Kind, Values
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_rnn

NAMES = tuple(kind.name for kind in CLASSES)
INPUT, HIDDEN = 17, 33


def make(kind: Kind, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A layer of torch.nn's, seeded; layers of more than one step get two levels and both directions."""
    torch.manual_seed(3)
    options = {**kind.options, **options}
    if not kind.is_cell:
        options = {"num_layers": 2, "bidirectional": True, **options}
    return kind.theirs(INPUT, HIDDEN, dtype=dtype, **options)


def results(layer: nn.Module, dtype: torch.dtype = torch.float32) -> list[Values]:
    """Outputs and gradients on eight inputs, the same ones at every call and in every dtype.

    Eight, for the law compares with the largest error of torch.nn's, which is luck over few numbers.
    """
    torch.manual_seed(4)
    inputs = [parity.make_input(layer, dtype=torch.float32).to(dtype).requires_grad_() for _ in range(8)]
    return [parity.run(layer, x) for x in inputs]


def assert_law(ours: list[Values], torchs: list[Values], exact: list[Values]) -> None:
    parity.assert_law(*zip(ours, torchs, exact, strict=True))


def assert_equal(ours: list[Values], others: list[Values]) -> None:
    for mine, other in zip(ours, others, strict=True):
        parity.assert_equal(mine, other)


def assert_same_state(before: dict, after: dict) -> None:
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before._metadata == after._metadata


class Net(nn.Module):
    """Recurrent layers in every kind of place, two of them in more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, INPUT), make(parity.GRU))
        pair = nn.ModuleDict({"cell": make(parity.GRU_CELL), "rnn": make(parity.RNN)})
        self.layers = nn.ModuleList([make(parity.LSTM), pair])
        self.cells = nn.ModuleDict(
            {"lstm": make(parity.LSTM_CELL), "rnn": make(parity.RNN_CELL, nonlinearity="relu")}
        )
        self.first = self.second = make(parity.LSTM, bidirectional=False, proj_size=2)
        self.layers.append(self.first)


# ---------------------------------------------------------------- what stays


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_only_the_class_changes(kind):
    layer = make(kind).eval()
    layer.note = {"set by": "the user"}
    layer.register_buffer("seen", torch.zeros(2))
    before, parameters, state = dict(vars(layer)), list(layer.named_parameters()), layer.state_dict()

    def assert_nothing_else_changed():
        assert vars(layer).keys() == before.keys()
        assert all(vars(layer)[key] is before[key] for key in before)
        named = zip(layer.named_parameters(), parameters, strict=True)
        assert all(key == old_key and value is old for (key, value), (old_key, old) in named)
        assert not layer.training
        assert_same_state(state, layer.state_dict())
        assert repr(layer) == repr(make(kind))

    assert fused_rnn.convert(layer) is layer
    assert type(layer) is kind.ours
    assert_nothing_else_changed()
    assert fused_rnn.revert(layer) is layer
    assert type(layer) is kind.theirs
    assert_nothing_else_changed()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_results_are_those_of_torch(kind):
    layer, exact = make(kind), results(make(kind).double(), torch.float64)
    theirs = results(layer)
    assert_law(results(fused_rnn.convert(layer)), theirs, exact)
    assert_equal(results(fused_rnn.revert(layer)), theirs)


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_calls_are_idempotent_and_undo_each_other(kind):
    layer = make(kind)
    assert type(fused_rnn.revert(layer)) is kind.theirs
    assert type(fused_rnn.convert(fused_rnn.convert(layer))) is kind.ours
    assert type(fused_rnn.convert(fused_rnn.revert(layer))) is kind.ours


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_that_was_ours_from_the_start_reverts(kind):
    twins = parity.make_twins(kind, INPUT, HIDDEN)
    reverted = fused_rnn.revert(twins.ours)
    assert type(reverted) is kind.theirs
    assert vars(reverted).keys() == vars(twins.theirs).keys()
    assert_equal(results(reverted), results(twins.theirs))


# ---------------------------------------------------------------- where layers are found


def test_nested_and_tied_layers():
    model = Net()
    state = model.state_dict()
    places = dict(model.named_modules(remove_duplicate=False))
    names = {path: type(module).__name__ for path, module in places.items()}
    recurrent = {path: name for path, name in names.items() if name in NAMES}
    assert len(recurrent) == 9

    assert fused_rnn.convert(model) is model

    after = dict(model.named_modules(remove_duplicate=False))
    assert after.keys() == places.keys() and all(after[path] is places[path] for path in places)
    assert all(type(after[path]) is getattr(fused_rnn, name) for path, name in recurrent.items())
    assert all(type(after[path]).__name__ == name for path, name in names.items())
    assert model.first is model.second is model.layers[2]
    assert_same_state(state, model.state_dict())

    fused_rnn.revert(model)
    assert all(type(after[path]) is getattr(nn, name) for path, name in recurrent.items())


def test_references_from_outside_see_the_change():
    layer = make(parity.GRU)
    first, second = nn.ModuleList([layer]), nn.Sequential(layer)

    def closure(x):
        return layer(x)

    fused_rnn.convert(first)
    x = parity.make_input(layer)
    assert type(second[0]) is fused_rnn.GRU
    assert torch.equal(closure(x)[0], second(x)[0])


def test_a_compiled_model_uses_the_new_class(monkeypatch):
    calls, forward = [], fused_rnn.GRUCell.forward

    def counted(self, *args):
        calls.append(1)
        return forward(self, *args)

    monkeypatch.setattr(fused_rnn.GRUCell, "forward", counted)
    cell = make(parity.GRU_CELL)
    compiled, x = torch.compile(cell, backend="eager"), parity.make_input(cell)
    theirs = compiled(x)
    assert not calls
    torch.testing.assert_close(fused_rnn.convert(compiled)(x), theirs)
    assert calls == [1]


class UserLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


def own_parametrizations() -> nn.Module:
    layer = UserLSTM(INPUT, HIDDEN)
    layer.parametrizations = nn.ModuleDict({"scale": nn.Identity()})
    return layer


def replaced_forward() -> nn.Module:
    layer = make(parity.LSTM)
    layer.forward = types.MethodType(lambda self, x: x, layer)
    return layer


UNTOUCHED = {
    "subclass": lambda: UserLSTM(INPUT, HIDDEN),
    "parametrised subclass": lambda: parametrizations.weight_norm(UserLSTM(INPUT, HIDDEN), "weight_hh_l0"),
    "subclass with parametrizations of its own": own_parametrizations,
    "subclass of ours": lambda: type("UserGRU", (fused_rnn.GRU,), {})(INPUT, HIDDEN),
    "own forward": replaced_forward,
    "scripted": lambda: torch.jit.script(nn.Sequential(make(parity.GRU_CELL))),
    "quantised": lambda: torch.ao.quantization.quantize_dynamic(
        nn.Sequential(make(parity.LSTM), make(parity.GRU_CELL))
    ),
    "not recurrent": lambda: nn.Linear(2, 2),
}


# torch.jit.script and quantize_dynamic are deprecated, and still used.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", UNTOUCHED)
def test_what_is_left_alone(kind):
    model = UNTOUCHED[kind]()
    types_before = [type(module) for module in model.modules()]
    for swap in (fused_rnn.convert, fused_rnn.revert):
        assert swap(model) is model
        assert [type(module) for module in model.modules()] == types_before


# ---------------------------------------------------------------- what hangs on a layer


def test_hooks_of_every_kind_still_fire():
    layer, fired = make(parity.LSTM), []

    def hook(label):
        def run(*args):
            assert args[0] is layer
            fired.append((label, len(args)))

        return run

    handles = [
        layer.register_forward_pre_hook(hook("pre")),
        layer.register_forward_pre_hook(hook("pre kwargs"), with_kwargs=True),
        layer.register_forward_hook(hook("forward")),
        layer.register_forward_hook(hook("forward kwargs"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(hook("backward pre")),
        layer.register_full_backward_hook(hook("backward")),
        layer.register_state_dict_pre_hook(hook("state")),
        layer.register_state_dict_post_hook(hook("state post")),
        layer.register_load_state_dict_pre_hook(hook("load")),
        layer.register_load_state_dict_post_hook(hook("load post")),
    ]
    fused_rnn.convert(layer)

    layer(parity.make_input(layer).requires_grad_())[0].sum().backward()
    forward_hooks = [("pre", 2), ("pre kwargs", 3), ("forward", 3), ("forward kwargs", 4)]
    assert fired == [*forward_hooks, ("backward pre", 2), ("backward", 3)]
    fired.clear()
    layer.load_state_dict(layer.state_dict())
    assert [label for label, _ in fired] == ["state", "state post", "load", "load post"]
    fired.clear()
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.zeros(4, 3, INPUT + 1))
    # Of the two forward hooks, only the one with always_call.
    assert [label for label, _ in fired] == ["pre", "pre kwargs", "forward kwargs"]
    fired.clear()
    for handle in handles:
        handle.remove()
    layer.load_state_dict(layer.state_dict())
    layer(parity.make_input(layer))
    assert not fired


PARAMETRISED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("how", PARAMETRISED)
@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_parametrised_layers(kind, how):
    weights = ("weight_ih", "weight_hh") if kind.is_cell else ("weight_hh_l0", "weight_ih_l1_reverse")
    layer, exact = make(kind).eval(), make(kind).double().eval()
    for weight in weights:
        PARAMETRISED[how](layer, weight)
        PARAMETRISED[how](exact, weight)
    state = layer.state_dict()
    exact.load_state_dict(state)
    bystander = copy.deepcopy(layer)  # shares the class that parametrize made
    theirs = results(layer)

    fused_rnn.convert(nn.Sequential(layer))

    assert isinstance(layer, kind.ours) and not isinstance(layer, kind.theirs)
    assert type(layer).__name__ == f"Parametrized{kind.cls}"
    assert all(parametrize.is_parametrized(layer, weight) for weight in weights)
    assert type(bystander).__bases__ == (kind.theirs,)
    assert_same_state(state, layer.state_dict())
    assert_law(results(layer), theirs, results(exact, torch.float64))

    fused_rnn.revert(layer)
    assert type(layer).__bases__ == (kind.theirs,)
    assert_equal(results(layer), theirs)

    fused_rnn.convert(layer)
    with torch.no_grad():
        before = results(layer)
    for weight in weights:
        parametrize.remove_parametrizations(layer, weight)
    assert type(layer) is kind.ours
    with torch.no_grad():
        assert_equal(results(layer), before)
    assert all(parametrize.is_parametrized(bystander, weight) for weight in weights)


PRE_HOOKED = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (partial(nn.utils.spectral_norm, n_power_iterations=15), nn.utils.remove_spectral_norm),
    "prune": (lambda layer, weight: prune.l1_unstructured(layer, weight, amount=0.5), prune.remove),
}


# The old weight_norm is deprecated, and still used.
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", PRE_HOOKED)
@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_layers_whose_weights_a_pre_hook_sets(kind, how):
    weight = "weight_hh" if kind.is_cell else "weight_hh_l0"
    layer, exact = make(kind).eval(), make(kind).double().eval()
    apply, remove = PRE_HOOKED[how]
    apply(layer, weight)
    apply(exact, weight)
    layer.train()(parity.make_input(layer))  # finds spectral_norm's singular vectors, random until then
    state = layer.eval().state_dict()
    exact.load_state_dict(state)
    theirs = results(layer)

    fused_rnn.convert(layer)

    assert type(layer) is kind.ours
    assert weight not in dict(layer.named_parameters())
    assert_same_state(state, layer.state_dict())
    assert_law(results(layer), theirs, results(exact, torch.float64))
    with torch.no_grad():
        before = results(layer)
        remove(layer, weight)
        assert_equal(results(layer), before)
    assert weight in dict(layer.named_parameters())


# ---------------------------------------------------------------- a model's life afterwards


def train(steps: int, convert_at: int | None) -> list[float]:
    model = nn.ModuleList([make(parity.LSTM, torch.float64), nn.Linear(2 * HIDDEN, 1, dtype=torch.float64)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, losses = parity.make_input(model[0]), []
    for step in range(steps):
        if step == convert_at:
            fused_rnn.convert(model)
        loss = (model[1](model[0](x)[0]).squeeze(-1) - x.sum(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_an_optimizer_goes_on_training():
    never, midway = train(12, None), train(12, convert_at=4)
    assert midway[-1] < midway[3] < midway[0]
    # Adam divides by the root of squared gradients: a difference of an ulp grows by orders over the steps.
    assert midway == pytest.approx(never, rel=1e-10)


def test_pickle_deepcopy_and_torch_save():
    model = fused_rnn.convert(Net())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, x = torch.load(file, weights_only=False), parity.make_input(model.first)
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), loaded):
        assert [type(module) for module in clone.modules()] == [type(module) for module in model.modules()]
        assert clone.first is clone.second is clone.layers[2]
        assert_same_state(model.state_dict(), clone.state_dict())
        assert torch.equal(clone.first(x)[0], model.first(x)[0])


@pytest.mark.parametrize("swap", [fused_rnn.convert, fused_rnn.revert])
@pytest.mark.parametrize(
    ("wrong", "described"),
    [(nn.LSTM, "type: <class"), ("lstm.pt", "str: 'lstm.pt'"), (None, "NoneType: None")],
)
def test_what_is_not_a_module_is_refused(swap, wrong, described):
    message = f"{swap.__name__}() expects a torch.nn.Module, got {described}"
    with pytest.raises(TypeError, match=re.escape(message)):
        swap(wrong)
