"""Bad input: the error torch.nn raises, class and text; a proper one where torch.nn lets a raw one through or
worse.

`ours` and `theirs` are called in the same way and what they raise is compared. Where torch.nn's text comes
from deep inside a kernel ("mat1 and mat2 must have the same dtype", "get_mkldnn_dtype: unsupported data
type"), ours is free to say it better: the class is torch.nn's and the text is held to naming what is wrong.
"""

from __future__ import annotations

import pytest
import torch
from mistakes import B, H, I, T, assert_same_error, outcome, state
from parity import CELLS, CLASSES, GRU, LAYERS, LSTM, LSTM_CELL, LSTM_PROJ, RNN, make_twins, pack
from torch import nn
from torch.nn.utils.rnn import PackedSequence

layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
cells = pytest.mark.parametrize("kind", CELLS, ids=str)


# ------------------------------------------------------------------------------------------ layers, the input


@layers
@pytest.mark.parametrize("shape", [(), (I,), (1, T, B, I), (1, 1, T, B, I)], ids=str)
def test_rank_of_input(kind, shape):
    assert_same_error(kind, lambda module: module(torch.zeros(shape)))


@layers
@pytest.mark.parametrize("shape", [(T, B, 7), (T, 7), (T, B, 0)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_size_of_input(kind, shape, batch_first):
    assert_same_error(kind, lambda module: module(torch.zeros(shape)), batch_first=batch_first)


@layers
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_dtype_of_input(kind, dtype):
    assert_same_error(kind, lambda module: module(torch.zeros(T, B, I, dtype=dtype)))


@layers
@pytest.mark.parametrize(
    ("shape", "batch_first"), [((0, B, I), False), ((B, 0, I), True), ((0, I), False)], ids=str
)
@pytest.mark.parametrize("grad", [False, True])
def test_sequence_of_length_zero(kind, shape, batch_first, grad):
    with torch.set_grad_enabled(grad):
        assert_same_error(kind, lambda module: module(torch.zeros(shape)), batch_first=batch_first)


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize(
    ("args", "options"),
    [((), {}), ((torch.zeros(B, I), None, None), {}), ((torch.zeros(B, I),), {"h0": None})],
    ids=["none", "three", "keyword"],
)
def test_arguments_of_forward(kind, args, options):
    """Python's own words, after the name of the class that holds `forward`."""
    twins = make_twins(kind, I, H)
    (theirs, its_text), (ours, text) = (
        outcome(lambda m=m: m(*args, **options)) for m in (twins.theirs, twins.ours)
    )
    assert ours is theirs is TypeError
    assert text.split(".forward() ")[1] == its_text.split(".forward() ")[1]


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize("value", [None, [1.0, 2.0], "text", 3], ids=repr)
def test_input_that_is_no_tensor(kind, value):
    """torch.nn's AttributeError, or a TypeError that says so."""
    module = make_twins(kind, I, H).ours
    with pytest.raises((AttributeError, TypeError)):
        module(value)


# ------------------------------------------------------------------------------------------------- layers, hx


@layers
@pytest.mark.parametrize(
    "shape",
    [
        (1, B, H + 1),
        (1, B, H - 1),
        (1, B + 1, H),
        (1, 1, H),
        (2, B, H),
        (0, B, H),
        (B, 1, H),
        (B, H),
        (H,),
        (1, 1, B, H),
    ],
    ids=str,
)
def test_shape_of_hx(kind, shape):
    assert_same_error(kind, lambda module: module(torch.zeros(T, B, I), state(kind, *shape)))


@layers
@pytest.mark.parametrize("shape", [(1, H + 1), (2, H), (H,), (1, 1, H), (1, 1, 1, H)], ids=str)
def test_shape_of_hx_without_batch(kind, shape):
    assert_same_error(kind, lambda module: module(torch.zeros(T, I), state(kind, *shape)))


@layers
def test_batch_first_never_applies_to_hx(kind):
    right = 3 if kind is LSTM_PROJ else H
    assert_same_error(
        kind, lambda module: module(torch.zeros(B, T, I), state(kind, B, 1, right)), batch_first=True
    )


@layers
def test_layers_and_directions_of_hx(kind):
    options = {"num_layers": 2, "bidirectional": True}
    assert_same_error(kind, lambda module: module(torch.zeros(T, B, I), state(kind, 2, B, H)), **options)


@pytest.mark.parametrize("kind", [LSTM, LSTM_PROJ], ids=str)
@pytest.mark.parametrize(
    ("h_shape", "c_shape"),
    [
        ((1, B, H), (1, B, H + 1)),
        ((1, B, H), (1, B + 1, H)),
        ((1, B, H), (B, H)),
        ((B, H), (1, B, H)),
        ((1, B, H + 1), (1, B, H + 2)),
        ((1, B, 3), (1, B, 3)),
        ((1, B, 3), (2, B, H)),
    ],
    ids=str,
)
def test_shapes_of_h_and_c(kind, h_shape, c_shape):
    assert_same_error(
        kind, lambda module: module(torch.zeros(T, B, I), (torch.zeros(h_shape), torch.zeros(c_shape)))
    )


@pytest.mark.parametrize("kind", [LSTM, LSTM_CELL], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_number_of_states(kind, count):
    """torch.nn: "lstm expects two hidden states", or an IndexError from looking for the second."""
    twins = make_twins(kind, I, H)
    shape, x = ((B, H), torch.zeros(B, I)) if kind.is_cell else ((1, B, H), torch.zeros(T, B, I))
    hx = (torch.zeros(shape),) * count
    assert outcome(lambda: twins.theirs(x, hx)) is not None
    error, text = outcome(lambda: twins.ours(x, hx)) or (None, "")
    assert error in (RuntimeError, IndexError, ValueError, TypeError), text


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize(
    "hx", ["text", 3, {}, [None], object()], ids=["str", "int", "dict", "list", "object"]
)
def test_hx_of_another_type(kind, hx):
    twins = make_twins(kind, I, H)
    x = torch.zeros(B, I) if kind.is_cell else torch.zeros(T, B, I)
    assert outcome(lambda: twins.theirs(x, hx)) is not None
    error, text = outcome(lambda: twins.ours(x, hx)) or (None, "")
    assert error is not None and issubclass(error, (TypeError, AttributeError, LookupError, RuntimeError)), (
        text
    )


@pytest.mark.parametrize("kind", [LSTM, LSTM_CELL], ids=str)
def test_a_lone_tensor_is_no_lstm_state(kind):
    ours = make_twins(kind, I, H).ours
    x, hx = (
        (torch.zeros(B, I), torch.zeros(B, H))
        if kind.is_cell
        else (torch.zeros(T, B, I), torch.zeros(1, B, H))
    )
    error, text = outcome(lambda: ours(x, hx)) or (None, "")
    assert error in (TypeError, IndexError, RuntimeError, ValueError), text


@pytest.mark.parametrize("kind", [RNN, GRU], ids=str)
def test_a_pair_is_no_state_of_rnn_and_gru(kind):
    ours = make_twins(kind, I, H).ours
    error, text = outcome(lambda: ours(torch.zeros(T, B, I), (torch.zeros(1, B, H),) * 2)) or (None, "")
    assert error in (AttributeError, TypeError, RuntimeError), text


@layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dtype_of_hx(kind, dtype, packed):
    """torch.nn: "mat1 and mat2 must have the same dtype, but got Double and Float", or oneDNN's own words."""
    twins = make_twins(kind, I, H)
    x = pack([4, 2])(torch.zeros(T, B, I)) if packed else torch.zeros(T, B, I)
    h_size = 3 if kind is LSTM_PROJ else H
    hx = torch.zeros(1, B, h_size, dtype=dtype)
    hx = (hx, torch.zeros(1, B, H, dtype=dtype)) if kind.is_lstm else hx
    error, _ = outcome(lambda: twins.theirs(x, hx))
    assert error is RuntimeError
    with pytest.raises(RuntimeError, match="dtype"):
        twins.ours(x, hx)


# ----------------------------------------------------------------------------------------------------- packed

# (lengths, shape of the padded input, shape of hx) that are wrong, and the same mistake made with padded
# input, whose text is the proper one: torch.nn checks nothing of an LSTM's packed input and lets matmul
# speak. Unsorted lengths make torch.nn permute hx before looking at it, with an error of index_select's or,
# for too many rows, none at all.
PACKED_MISTAKES = [
    pytest.param((T, B, I + 4), (1, B, H), id="input_size"),
    pytest.param((T, B, I), (1, B, H + 1), id="hidden_size"),
    pytest.param((T, B, I), (2, B, H), id="num_layers"),
    pytest.param((T, B, I), (1, B - 1, H), id="fewer_rows"),
    pytest.param((T, B, I), (1, B + 1, H), id="more_rows"),
]


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("lengths", [[4, 2], [2, 4]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize(("x_shape", "hx_shape"), PACKED_MISTAKES)
def test_packed_sizes(kind, lengths, x_shape, hx_shape):
    twins = make_twins(kind, I, H)
    x, hx = torch.zeros(x_shape), state(kind, *hx_shape)
    proper = outcome(lambda: twins.theirs(x, hx))
    assert proper is not None
    form = pack(lengths, enforce_sorted=lengths == sorted(lengths, reverse=True))
    assert outcome(lambda: twins.ours(form(x), hx)) == proper


@pytest.mark.parametrize("part", [0, 1], ids=["h", "c"])
@pytest.mark.parametrize("wrong", [(1, B, H + 1), (1, B + 1, H)], ids=str)
def test_packed_lstm_names_the_wrong_state(part, wrong):
    twins = make_twins(LSTM, I, H)
    hx = [torch.zeros(1, B, H), torch.zeros(1, B, H)]
    hx[part] = torch.zeros(wrong)
    proper = outcome(lambda: twins.theirs(torch.zeros(T, B, I), tuple(hx)))
    assert outcome(lambda: twins.ours(pack([4, 2])(torch.zeros(T, B, I)), tuple(hx))) == proper


@layers
@pytest.mark.parametrize("lengths", [[4, 2], [2, 4]], ids=["sorted", "unsorted"])
def test_packed_rank_of_hx(kind, lengths):
    """Packed input has no form without a batch dimension: hx is 3-D, and the text that of padded input."""
    twins = make_twins(kind, I, H)
    x, hx = torch.zeros(T, B, I), state(kind, B, H)
    proper = outcome(lambda: twins.theirs(x, hx))
    assert proper is not None
    assert outcome(lambda: twins.ours(pack(lengths)(x), hx)) == proper


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_packed_dtype(kind, dtype):
    twins = make_twins(kind, I, H)
    x = torch.zeros(T, B, I, dtype=dtype)
    assert outcome(lambda: twins.ours(pack([4, 2])(x))) == outcome(lambda: twins.theirs(x))


@layers
def test_packed_data_is_a_matrix(kind):
    x = PackedSequence(torch.zeros(4, 1, I), torch.tensor([2, 2]))
    twins = make_twins(kind, I, H)
    expected = (RuntimeError, "input must have 2 dimensions, got 3")
    if not kind.is_lstm:
        assert outcome(lambda: twins.theirs(x)) == expected
    assert outcome(lambda: twins.ours(x)) == expected


@layers
@pytest.mark.parametrize(
    ("rows", "batch_sizes"),
    [
        pytest.param(5, [2, 2], id="rows-left-over"),
        pytest.param(3, [2, 2], id="rows-missing"),
        pytest.param(4, [1, 3], id="growing"),
        pytest.param(4, [2, 1, 2], id="growing-later"),
        pytest.param(4, [2, 0, 2], id="empty-step"),
        pytest.param(4, [5, -1], id="negative"),
        pytest.param(0, [], id="no-steps"),
    ],
)
def test_packed_by_hand_and_inconsistent(kind, rows, batch_sizes):
    """torch.nn reads and writes past the end of some of these. An error, whatever its text."""
    ours = make_twins(kind, I, H).ours
    x = PackedSequence(torch.zeros(rows, I), torch.tensor(batch_sizes, dtype=torch.int64))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        ours(x)


# -------------------------------------------------------------------------------------------- weights, device


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (0, 0), (4 * H, 7)], ids=str)
def test_weight_of_the_wrong_shape(kind, name, shape):
    """torch.nn's float32 LSTM multiplies by whatever lies behind a weight that is too small."""
    ours = make_twins(kind, I, H).ours
    setattr(ours, name if kind.is_cell else f"{name}_l0", nn.Parameter(torch.zeros(shape)))
    with pytest.raises((RuntimeError, ValueError)):
        ours(torch.zeros(B, I) if kind.is_cell else torch.zeros(T, B, I))


@pytest.mark.parametrize("kind", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_weight_taken_away(kind, name):
    """By assigning None, which a cell's bias allows."""
    twins = make_twins(kind, I, H)
    for module, words in ((twins.theirs, "got NoneType"), (twins.ours, "a parameter is None; bias=False")):
        setattr(module, name, None)
        with pytest.raises(TypeError, match=words):
            module(torch.zeros(T, B, I))


def test_projection_of_the_wrong_shape():
    ours = make_twins(LSTM_PROJ, I, H).ours
    ours.weight_hr_l0 = nn.Parameter(torch.zeros(2, H))
    with pytest.raises((RuntimeError, ValueError)):
        ours(torch.zeros(T, B, I))


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_hh"])
def test_weights_of_mixed_dtypes(kind, name):
    twins = make_twins(kind, I, H)
    x = torch.zeros(B, I) if kind.is_cell else torch.zeros(T, B, I)

    def widen(module):
        weight = getattr(module, name if kind.is_cell else f"{name}_l0")
        weight.data = weight.data.double()

    twins.apply(widen)
    assert outcome(lambda: twins.theirs(x)) is not None
    error, text = outcome(lambda: twins.ours(x)) or (None, "")
    assert error in (RuntimeError, ValueError) and "dtype" in text, text


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize("what", ["x", "hx", "weight"])
def test_two_devices(kind, what):
    """The layers': "Input and hidden tensors are not at the same device, found input tensor at cpu and ..."."""
    twins = make_twins(kind, I, H)
    x = torch.zeros(B, I) if kind.is_cell else torch.zeros(T, B, I)
    hx = state(kind, B, H) if kind.is_cell else state(kind, 1, B, H)
    if what == "x":
        x = x.to("meta")
    elif what == "hx":
        hx = tuple(h.to("meta") for h in hx) if kind.is_lstm else hx.to("meta")
    else:
        twins.apply(lambda module: module.to("meta"))
    expected = outcome(lambda: twins.theirs(x, hx))
    error, text = outcome(lambda: twins.ours(x, hx)) or (None, "")
    assert expected is not None
    if not kind.is_cell:
        assert (error, text) == expected
    assert error is not None and issubclass(error, (RuntimeError, ValueError)) and "device" in text, text


# --------------------------------------------------------------------------------------------- after an error


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_an_error_leaves_the_module_usable(kind):
    ours = make_twins(kind, I, H).ours
    x = torch.randn(B, I) if kind.is_cell else torch.randn(T, B, I)
    first = ours(x)
    assert outcome(lambda: ours(torch.zeros(B, I + 1))) is not None
    for before, after in zip(first, ours(x), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_backward_twice_needs_retain_graph(kind):
    def twice(module):
        loss = module(torch.ones(B, I))[0].sum()
        loss.backward()
        loss.backward()

    assert_same_error(kind, twice)
