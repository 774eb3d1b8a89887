"""Bad input to the cells: the error torch.nn raises, class and text (see test_errors.py)."""

from __future__ import annotations

import pytest
import torch
from mistakes import B, H, I, assert_same_error, outcome, state
from parity import CELLS, LSTM_CELL, make_twins

cells = pytest.mark.parametrize("kind", CELLS, ids=str)


@cells
@pytest.mark.parametrize("shape", [(), (1, B, I), (1, 1, B, I), (B, I + 4), (I + 4,), (B, 0), (0,)], ids=str)
def test_cell_input(kind, shape):
    assert_same_error(kind, lambda module: module(torch.zeros(shape)))


@cells
@pytest.mark.parametrize(
    "shape",
    [(), (B, H + 1), (B + 1, H), (1, H), (H,), (1, B, H), (B, 1, 1, H), (B + 1, H + 1), (B, 0)],
    ids=str,
)
def test_cell_hx(kind, shape):
    assert_same_error(kind, lambda module: module(torch.zeros(B, I), state(kind, *shape)))


@cells
@pytest.mark.parametrize("shape", [(H + 1,), (1, H), (B, H), (0,)], ids=str)
def test_cell_hx_without_batch(kind, shape):
    assert_same_error(kind, lambda module: module(torch.zeros(I), state(kind, *shape)))


@pytest.mark.parametrize("shape", [(B, H + 1), (B + 1, H), (H,), (B, H, 1), (B, 1, 1, H), (1, H)], ids=str)
def test_lstm_cell_c(shape):
    assert_same_error(
        LSTM_CELL, lambda module: module(torch.zeros(B, I), (torch.zeros(B, H), torch.zeros(shape)))
    )


def test_lstm_cell_names_the_first_mistake():
    wrong = (torch.zeros(B, H + 1), torch.zeros(B + 1, H))
    assert_same_error(LSTM_CELL, lambda module: module(torch.zeros(B, I), wrong))
    assert_same_error(LSTM_CELL, lambda module: module(torch.zeros(B, I + 1), wrong))


@cells
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("what", ["x", "hx"])
def test_cell_dtypes(kind, dtype, what):
    twins = make_twins(kind, I, H)
    x, hx = torch.zeros(B, I), state(kind, B, H)
    if what == "x":
        x = x.to(dtype)
    else:
        hx = tuple(h.to(dtype) for h in hx) if kind.is_lstm else hx.to(dtype)
    error, _ = outcome(lambda: twins.theirs(x, hx))
    assert error is RuntimeError
    with pytest.raises(RuntimeError, match="dtype"):
        twins.ours(x, hx)


@pytest.mark.parametrize("shape", [(B, I), (B, I + 1)], ids=["right input", "wrong input"])
def test_unknown_nonlinearity_fails_in_forward(shape):
    assert_same_error(CELLS[0], lambda module: module(torch.zeros(shape)), nonlinearity="elu")


def test_nonlinearity_may_be_changed():
    twins = make_twins(CELLS[0], I, H)
    x = torch.randn(B, I)
    for name in ("relu", "tanh"):
        twins.apply(lambda module, name=name: setattr(module, "nonlinearity", name))
        torch.testing.assert_close(twins.ours(x), twins.theirs(x))
