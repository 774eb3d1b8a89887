"""What the tests of errors share: sizes, and a call of ours and of torch.nn's whose errors are compared."""

from __future__ import annotations

import torch
from parity import make_twins

I, H, T, B = 3, 5, 4, 2  # input size, hidden size, steps, batch


def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def assert_same_error(kind, call, **options) -> None:
    twins = make_twins(kind, I, H, **options)
    theirs = outcome(lambda: call(twins.theirs))
    assert theirs is not None, "torch.nn accepts this: it is no error"
    assert outcome(lambda: call(twins.ours)) == theirs


def state(kind, *shape, **options):
    """An hx of zeros of one shape, wrong or right; a pair for the LSTM kinds."""
    zeros = torch.zeros(shape, **options)
    return (zeros, zeros.clone()) if kind.is_lstm else zeros
