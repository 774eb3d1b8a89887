"""Construction: signatures, parameters, random numbers, repr, errors and warnings are torch.nn's."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from parity import CELLS, CLASSES, GRU, KINDS, LAYERS, LSTM, LSTM_PROJ, RNN, RNN_CELL, Kind
from torch import nn

LAYER_OPTIONS = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "dropout": 0.25},
]
CONFIGURATIONS = [(kind, options) for kind in LAYERS for options in LAYER_OPTIONS]
CONFIGURATIONS += [(kind, options) for kind in CELLS for options in ({}, {"bias": False})]


def name_of(value) -> str:
    return (
        str(value) if isinstance(value, Kind) else ",".join(f"{k}={v}" for k, v in value.items()) or "plain"
    )


configurations = pytest.mark.parametrize(("kind", "options"), CONFIGURATIONS, ids=name_of)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)


def both(kind: Kind, *args, **options) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's, each from the same seed."""
    options = {**kind.options, **options}
    torch.manual_seed(11)
    ours = kind.ours(*args, **options)
    torch.manual_seed(11)
    return ours, kind.theirs(*args, **options)


# ------------------------------------------------------------------------------------------------- parameters


@configurations
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_same_seed_gives_the_same_parameters_in_the_same_order(kind, options, dtype):
    torch.manual_seed(11)
    ours = kind.ours(5, 7, dtype=dtype, **kind.options, **options)
    state_of_ours = torch.get_rng_state()
    torch.manual_seed(11)
    theirs = kind.theirs(5, 7, dtype=dtype, **kind.options, **options)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == its.dtype == dtype and torch.equal(mine, its), name
        assert mine.requires_grad and type(mine) is nn.Parameter and mine.stride() == its.stride(), name
    assert torch.equal(state_of_ours, torch.get_rng_state()), "a different number of random numbers was drawn"


@configurations
def test_reset_parameters_draws_as_torch_does(kind, options):
    ours, theirs = both(kind, 5, 7, **options)
    torch.manual_seed(5)
    ours.reset_parameters()
    torch.manual_seed(5)
    theirs.reset_parameters()
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its), name


@configurations
def test_no_buffers_and_the_same_attributes(kind, options):
    ours, theirs = both(kind, 5, 7, **options)
    assert list(ours.buffers()) == list(theirs.buffers()) == []
    assert ours.training is theirs.training is True
    for name in kind.theirs.__constants__:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert set(kind.theirs.__constants__) <= set(kind.ours.__constants__)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()


@classes
def test_base_classes_are_torchs(kind):
    assert issubclass(kind.ours, nn.RNNCellBase if kind.is_cell else nn.RNNBase)
    assert kind.ours.__name__ == kind.theirs.__name__
    assert kind.ours.__module__.startswith("fused_rnn")


@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=name_of)
@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_weight_lists(kind, options):
    ours, theirs = both(kind, 5, 7, **options)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert [id(w) for w in ours._flat_weights] == [id(w) for w in ours.parameters()]
    assert len(ours.all_weights) == len(theirs.all_weights)
    for layer, names in zip(ours.all_weights, theirs._all_weights, strict=True):
        assert [id(weight) for weight in layer] == [id(getattr(ours, name)) for name in names]
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    assert ours.flatten_parameters() is None
    assert all(torch.equal(weight, before[name]) for name, weight in ours.named_parameters())


# -------------------------------------------------------------------------------------------------- arguments

LAYER_ARGUMENTS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
)
ARGUMENTS = {
    "RNN": (*LAYER_ARGUMENTS[:3], "nonlinearity", *LAYER_ARGUMENTS[3:], "device", "dtype"),
    "GRU": (*LAYER_ARGUMENTS, "device", "dtype"),
    "LSTM": (*LAYER_ARGUMENTS, "proj_size", "device", "dtype"),
    "RNNCell": ("input_size", "hidden_size", "bias", "nonlinearity", "device", "dtype"),
    "GRUCell": ("input_size", "hidden_size", "bias", "device", "dtype"),
    "LSTMCell": ("input_size", "hidden_size", "bias", "device", "dtype"),
}
DEFAULTS = {
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "proj_size": 0,
    "nonlinearity": "tanh",
    "device": None,
    "dtype": None,
    "recompute": False,  # ours alone, by keyword only
}


@classes
def test_signatures_are_explicit(kind):
    """torch.nn declares its layers (*args, **kwargs), which hides them from editors and `skip_init`."""
    parameters = {
        name: p for name, p in inspect.signature(kind.ours).parameters.items() if name != "proj_size"
    }
    expected = [name for name in ARGUMENTS[kind.cls] if name != "proj_size"]
    named = {n: p for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert [name for name in named if named[name].kind is not inspect.Parameter.KEYWORD_ONLY] == expected
    for name, parameter in named.items():
        assert parameter.default == DEFAULTS.get(name, parameter.empty), name
    if kind is LSTM:
        assert list(inspect.signature(kind.ours).parameters) == [*ARGUMENTS["LSTM"], "recompute"]


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (RNN, (5, 7, 2, "relu", False, True, 0.5, True)),
        (GRU, (5, 7, 2, False, True, 0.5, True)),
        (LSTM, (5, 7, 2, False, True, 0.5, True, 3, "cpu", torch.float64)),
        (RNN_CELL, (5, 7, False, "relu", "cpu", torch.float64)),
        (CELLS[2], (5, 7, False, "cpu", torch.float64)),
        (CELLS[3], (5, 7, False, "cpu", torch.float64)),
    ],
    ids=lambda value: str(value) if isinstance(value, Kind) else "",
)
def test_positional_arguments(kind, args):
    ours, theirs = both(kind, *args)
    assert repr(ours) == repr(theirs)
    for (name, mine), (its_name, its) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == its_name and mine.dtype == its.dtype and torch.equal(mine, its)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_skip_init(kind):
    module = nn.utils.skip_init(kind.ours, 5, 7, dtype=torch.float64, **kind.options)
    theirs = kind.theirs(5, 7, dtype=torch.float64, **kind.options)
    module.load_state_dict(theirs.state_dict())
    assert all(p.device.type == "cpu" and p.dtype == torch.float64 for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_default_dtype_and_device_contexts(kind):
    torch.set_default_dtype(torch.float64)
    assert {p.dtype for p in kind.ours(5, 7, **kind.options).parameters()} == {torch.float64}
    with torch.device("meta"):
        assert {p.device.type for p in kind.ours(5, 7, **kind.options).parameters()} == {"meta"}
    module = kind.ours(5, 7, device="meta", dtype=torch.bfloat16, **kind.options)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


@classes
def test_subclasses_may_rewrite_the_constructor(kind):
    class Narrow(kind.ours):
        def __init__(self, size):
            super().__init__(size, size)
            self.extra = nn.Linear(size, size)

    names = [name for name, _ in kind.theirs(4, 4).named_parameters()] + ["extra.weight", "extra.bias"]
    assert [name for name, _ in Narrow(4).named_parameters()] == names


# ------------------------------------------------------------------------------------------- errors, warnings

NAN = float("nan")
LAYER_CASES = [
    ((0, 5), {}),
    ((-1, 5), {}),
    ((3, 0), {}),
    ((3, -2), {}),
    ((3, 5, 0), {}),
    ((3, 5, -1), {}),
    ((3.0, 5), {}),
    (("3", 5), {}),
    ((3, 5.0), {}),
    ((np.int64(3), 5), {}),
    ((3, np.int64(5)), {}),
    ((None, 5), {}),
    ((True, 5), {}),
    ((3, 5, 1.5), {}),
    ((3, 5, "2"), {}),
    ((3, 5), {"bias": 1}),
    ((3, 5), {"bias": "True"}),
    ((3, 5), {"bias": None}),
    ((3, 5), {"batch_first": 1}),
    ((3, 5), {"batch_first": "False"}),
    ((3, 5), {"bidirectional": 1}),
    ((3, 5), {"bidirectional": None}),
    ((3, 5, 2), {"dropout": True}),
    ((3, 5, 2), {"dropout": "0.5"}),
    ((3, 5, 2), {"dropout": "half"}),
    ((3, 5, 2), {"dropout": None}),
    ((3, 5, 2), {"dropout": -0.1}),
    ((3, 5, 2), {"dropout": 1.1}),
    ((3, 5, 2), {"dropout": NAN}),
    ((3, 5, 2), {"dropout": torch.tensor(0.5)}),
    ((3, 5, 2), {"dropout": 1}),
    ((3, 5, 2), {"dropout": 0.5}),
    ((3, 5, 1), {"dropout": 0.5}),
    ((3, 5), {"device": "nowhere"}),
    ((3, 5), {"dtype": torch.int64}),
    ((3, 5), {"dtype": torch.float8_e4m3fn}),
    # which of two mistakes is named
    ((0, 0), {}),
    ((3, 5, 0), {"dropout": 2.0}),
    ((3.0, 0), {"bias": 1}),
]
RNN_CASES = [
    ((3, 5), {"nonlinearity": "elu"}),
    ((3, 5, 1, "elu"), {}),
    ((3, 5, 1, True), {}),
    ((3, 5), {"nonlinearity": None}),
    ((3, 5), {"proj_size": 2}),
    ((3, 5), {"proj_size": 0}),
    ((0, 5), {"proj_size": 2, "nonlinearity": "elu"}),
]
GRU_CASES = [((3, 5), {"proj_size": 2}), ((3, 5), {"proj_size": 0}), ((0, 5), {"proj_size": 2})]
LSTM_CASES = [
    ((3, 5), {"proj_size": -1}),
    ((3, 5), {"proj_size": 5}),
    ((3, 5), {"proj_size": 6}),
    ((3, 5), {"proj_size": 0}),
    ((3, 5), {"proj_size": 2.0}),
    ((3, 5), {"proj_size": "2"}),
    ((3, 5, 0), {"proj_size": -1}),
]
CELL_CASES = [
    ((3, 0), {}),
    ((0, 5), {}),
    ((3, -1), {}),
    ((3.0, 5), {}),
    (("3", 5), {}),
    ((np.int64(3), 5), {}),
    ((3, 5), {"bias": 1}),
    ((3, 5, 0), {}),
    ((3, 5, "relu"), {}),
    ((3, 5), {"dtype": torch.int64}),
    ((3, 5), {"device": "nowhere"}),
]
CASES = [(kind, *case) for kind in (RNN, GRU, LSTM) for case in LAYER_CASES]
CASES += [(RNN, *case) for case in RNN_CASES]
CASES += [(GRU, *case) for case in GRU_CASES]
CASES += [(LSTM, *case) for case in LSTM_CASES]
CASES += [(kind, *case) for kind in CELLS if not kind.options for case in CELL_CASES]
CASES += [(RNN_CELL, (3, 5), {"nonlinearity": "elu"}), (RNN_CELL, (3, 5, True, "relu"), {})]


def attempt(cls: type[nn.Module], args: tuple, options: dict):
    """What comes of a construction: the class and text of the error or the repr, and every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = repr(cls(*args, **options))
        except Exception as error:
            result = (type(error), str(error))
    return result, [(warning.category, str(warning.message)) for warning in caught]


@pytest.mark.parametrize(("kind", "args", "options"), CASES, ids=repr)
def test_bad_arguments_and_warnings_are_torchs(kind, args, options):
    assert attempt(kind.ours, args, options) == attempt(kind.theirs, args, options)


@classes
@pytest.mark.parametrize(
    ("args", "options"), [((3, 5), {"no_such": 1}), ((3,), {}), ((), {}), ((3, 5), {"mode": "GRU"})], ids=repr
)
def test_arguments_that_do_not_exist_are_type_errors(kind, args, options):
    """The class alone: torch.nn's text names RNNBase, a class that the caller never wrote."""
    with pytest.raises(TypeError):
        kind.theirs(*args, **options)
    with pytest.raises(TypeError, match="argument"):
        kind.ours(*args, **options)


# ---------------------------------------------------------------------------------------- methods of the base


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_expected_sizes(kind, batch_first):
    ours, theirs = both(kind, 5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, batch_sizes = torch.randn(4, 3, 5), torch.tensor([3, 2, 1])
    for module_input in ((x, None), (torch.randn(6, 5), batch_sizes)):
        assert ours.get_expected_hidden_size(*module_input) == theirs.get_expected_hidden_size(*module_input)
        if kind.is_lstm:
            assert ours.get_expected_cell_size(*module_input) == theirs.get_expected_cell_size(*module_input)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_check_methods(kind):
    ours, theirs = both(kind, 5, 7)
    good, bad = torch.zeros(1, 3, 7), torch.zeros(1, 2, 7)
    x = torch.randn(4, 3, 5)

    def outcomes(module):
        hx, wrong = ((good, good), (good, bad)) if kind.is_lstm else (good, bad)
        yield lambda: module.check_input(x, None)
        yield lambda: module.check_input(x[..., :4], None)
        yield lambda: module.check_input(x[0], None)
        yield lambda: module.check_input(x, torch.tensor([3, 3]))
        yield lambda: module.check_input(x.double(), None)
        yield lambda: module.check_hidden_size(good, (1, 3, 7))
        yield lambda: module.check_hidden_size(good, (1, 3, 8), "wanted {}, found {}")
        yield lambda: module.check_forward_args(x, hx, None)
        yield lambda: module.check_forward_args(x, wrong, None)

    for mine, its in zip(outcomes(ours), outcomes(theirs), strict=True):
        assert error_of(mine) == error_of(its)


def error_of(call):
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_permute_hidden(kind):
    ours, theirs = both(kind, 5, 7)
    hx, order = torch.randn(1, 3, 7), torch.tensor([2, 0, 1])
    hx = (hx, -hx) if kind.is_lstm else hx
    assert ours.permute_hidden(hx, None) is hx
    for mine, its in zip(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order), strict=True):
        assert torch.equal(mine, its)
