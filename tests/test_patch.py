"""patch: torch.nn's names are ours inside, and torch's again outside, whatever happened in between."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from torch import nn

import fused_rnn

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
OURS = {name: getattr(fused_rnn, name) for name in NAMES}
TORCH = {name: getattr(nn, name) for name in NAMES}  # kept here, for inside patch() the names are ours
NAMESPACES = (nn, nn.modules, nn.modules.rnn)

INPUT, HIDDEN = 5, 7


def names_are(classes: dict[str, type]) -> bool:
    return all(getattr(namespace, name) is classes[name] for namespace in NAMESPACES for name in NAMES)


def test_patch_builds_a_model_of_ours():
    with fused_rnn.patch():
        assert names_are(OURS)
        torch.manual_seed(3)
        layer = nn.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True)
    assert names_are(TORCH)
    assert type(layer) is OURS["LSTM"]
    torch.manual_seed(3)
    theirs = nn.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    pairs = zip(layer.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(mine, value) for mine, value in pairs)


def test_patch_loads_an_old_pickle_as_ours():
    pickled = pickle.dumps(nn.GRU(INPUT, HIDDEN))
    with fused_rnn.patch():
        layer = pickle.loads(pickled)
    assert type(layer) is OURS["GRU"]
    x = torch.randn(4, 2, INPUT)
    torch.testing.assert_close(layer(x)[0], pickle.loads(pickled)(x)[0])


def test_convert_and_revert_know_torchs_classes_inside_patch():
    layer = nn.GRU(INPUT, HIDDEN)
    with fused_rnn.patch():
        assert type(fused_rnn.convert(layer)) is OURS["GRU"]
        assert type(fused_rnn.revert(layer)) is TORCH["GRU"]


def test_patch_nests_and_is_undone_by_an_exception():
    with pytest.raises(KeyError, match="ours to raise"), fused_rnn.patch():
        with fused_rnn.patch():
            pass
        assert names_are(OURS)  # the inner block's end is not the outer's
        with pytest.raises(IndexError), fused_rnn.patch():
            raise IndexError
        assert names_are(OURS)
        raise KeyError("ours to raise")
    assert names_are(TORCH)


def test_patch_decorates_a_function():
    @fused_rnn.patch()
    def build(size, *, fail=False):
        if fail:
            raise ValueError("no model")
        return nn.GRUCell(size, size)

    for _ in range(2):
        assert type(build(2)) is OURS["GRUCell"]
        assert names_are(TORCH)
    with pytest.raises(ValueError, match="no model"):
        build(2, fail=True)
    assert names_are(TORCH)


def test_patches_of_two_threads_may_close_in_any_order():
    opened, close = threading.Event(), threading.Event()

    def hold_a_patch_open():
        with fused_rnn.patch():
            opened.set()
            close.wait(timeout=30)

    with fused_rnn.patch():
        thread = threading.Thread(target=hold_a_patch_open)
        thread.start()
        assert opened.wait(timeout=30)
    assert names_are(OURS)  # opened second, still open
    close.set()
    thread.join(timeout=30)
    assert names_are(TORCH)


def test_patch_puts_back_what_it_found(monkeypatch):
    theirs = type("SomebodysLSTM", (nn.LSTM,), {})
    monkeypatch.setattr(nn, "LSTM", theirs)
    with fused_rnn.patch():
        assert nn.LSTM is OURS["LSTM"]
    assert nn.LSTM is theirs
    assert nn.modules.rnn.LSTM is TORCH["LSTM"]
