"""The raw operators of higher derivatives and of many samples: schemas and fakes (opcheck), refusal of wrong calls, and
agreement with ``reference.py``, padded and packed. `make asan` runs them too.
"""

from __future__ import annotations

import pytest
import torch
from test_ops import LAYER_CASES, make_layer
from torch import Tensor

from fused_rnn import ops, reference

cases = pytest.mark.parametrize("cell, sizes", LAYER_CASES)
_V = 16  # where the direction begins in the arguments of layer_double_backward after `cell`
CHECKS = ("test_schema", "test_faketensor")


def alike(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.randn_like(tensor)


def first_order(cell: str, sizes: dict):
    """Gradients of the outputs, arguments (batch sizes apart), output, saved."""
    input, batch_sizes, *others = make_layer(cell, **sizes)
    output, hn, cn, saved = ops.layer_forward(cell, input, batch_sizes, *others, True)
    gradients = [alike(output), alike(hn), alike(cn) if cell == "lstm" else None]
    return gradients, batch_sizes, [input, *others], output, saved


def second_order(cell: str, sizes: dict):
    """Arguments of layer_double_backward after `cell` but for `needs`, and the gradients' and arguments' own."""
    gradients, batch_sizes, arguments, output, saved = first_order(cell, sizes)
    v = [alike(t) for t in arguments]
    *_, dh = ops.layer_backward(
        cell, *gradients, arguments[0], batch_sizes, *arguments[1:], output, saved, ops.STATE_GRADIENTS
    )
    call = [dh, gradients[2], arguments[0], batch_sizes, *arguments[1:], *v, output, saved]
    return call, batch_sizes, [*gradients, *arguments], v


@cases
def test_operators_pass_opcheck(cell: str, sizes: dict) -> None:
    gradients, batch_sizes, arguments, output, saved = first_order(cell, sizes)
    call = (cell, *gradients, batch_sizes, *arguments[1:], output, saved)
    torch.library.opcheck(ops.layer_gate_gradients, call, test_utils=CHECKS)
    call, _, first, _ = second_order(cell, sizes)
    needs = ops.bits([t is not None for t in first])
    for asked in (needs, needs | ops.ADDS):
        torch.library.opcheck(ops.layer_double_backward, (cell, *call, asked), test_utils=CHECKS)
    *_, adds = ops.layer_double_backward(cell, *call, needs | ops.ADDS)
    call = (cell, *gradients, arguments[0], batch_sizes, *arguments[1:], output, saved, needs >> 3, adds)
    torch.library.opcheck(ops.layer_backward, call, test_utils=CHECKS)


@cases
@pytest.mark.parametrize("without", [(), ("weights",), ("input", "states"), ("all but b_hh",)], ids=str)
def test_second_derivative_against_the_reference(cell: str, sizes: dict, without: tuple[str, ...]) -> None:
    """In a direction of everything, and of parts."""
    call, batch_sizes, first, v = second_order(cell, sizes)
    left_out = {"weights": range(3, 13), "input": (0,), "states": (1, 2), "all but b_hh": {*range(13)} - {6}}
    for part in without:
        for k in left_out[part]:
            v[k] = None
    call[_V : _V + 13] = v
    asked = [t is not None for t in first]
    found = ops.layer_double_backward(cell, *call, ops.bits(asked))
    leaves = [None if t is None else t.detach().requires_grad_() for t in first]
    expected = reference.second_order(cell, batch_sizes, asked)(*leaves, *v)
    found = [t for t in found if t is not None]
    assert len(found) == sum(asked)
    torch.testing.assert_close(found, list(expected), rtol=1e-10, atol=1e-10)


@cases
def test_a_backward_pass_takes_what_a_second_derivative_adds(cell: str, sizes: dict) -> None:
    """One pass with both gives the sum of the two."""
    call, batch_sizes, first, _ = second_order(cell, sizes)
    gradients, arguments, (output, saved) = first[:3], first[3:], call[-2:]
    needs = ops.bits([t is not None for t in first])
    backward = (cell, *gradients, arguments[0], batch_sizes, *arguments[1:], output, saved, needs >> 3)
    *alone, _ = ops.layer_double_backward(cell, *call, needs)
    *rest, adds = ops.layer_double_backward(cell, *call, needs | ops.ADDS)
    assert adds.abs().sum() > 0
    together = ops.layer_backward(*backward, adds)
    for found, plain, change, part in zip(
        together, ops.layer_backward(*backward), [*alone[3:], None], [*rest[3:], None], strict=True
    ):
        assert (found is None) == (change is None)
        if found is not None:
            sum_of_parts = found if part is None else found + part
            torch.testing.assert_close(sum_of_parts, plain + change, rtol=1e-11, atol=1e-11)
    with pytest.raises(RuntimeError, match="expected adds"):
        ops.layer_backward(*backward, adds[:, 1:])


@cases
def test_gate_gradients_make_the_weights_gradients(cell: str, sizes: dict) -> None:
    gradients, batch_sizes, arguments, output, saved = first_order(cell, sizes)
    dgates, previous, dh0, dc0 = ops.layer_gate_gradients(
        cell, *gradients, batch_sizes, *arguments[1:], output, saved
    )
    needs = ops.bits([t is not None for t in arguments])
    expected = ops.layer_backward(
        cell, *gradients, arguments[0], batch_sizes, *arguments[1:], output, saved, needs
    )
    for d in range(dgates.size(0)):
        w_hh = arguments[3 + 5 * d + 1]
        recurrent = dgates[d, :, : w_hh.size(0)]
        torch.testing.assert_close(recurrent.t() @ previous[d], expected[3 + 5 * d + 1])
    for state, value in ((dh0, expected[1]), (dc0, expected[2])):
        assert value is None or torch.equal(state, value)


@pytest.mark.parametrize(
    ("k", "size"), [(0, (2, 3, 5)), (1, (1, 3, 7)), (2, (1, 2, 6)), (3, (24, 5)), (4, (24, 5)), (5, (25,))]
)
def test_a_direction_of_a_wrong_size_is_refused(k: int, size: tuple[int, ...]) -> None:
    call, *_ = second_order("lstm", {"T": 2, "B": 3, "I": 4, "H": 6})
    call[_V + k] = torch.zeros(size, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"fused_rnn: expected|shape"):
        ops.layer_double_backward("lstm", *call, 0xFFFF)


def test_a_second_derivative_by_w_ih_needs_the_input() -> None:
    call, *_ = second_order("gru", {"T": 2, "B": 3, "I": 4, "H": 6})
    call[2] = None
    with pytest.raises(RuntimeError, match="by w_ih needs input"):
        ops.layer_double_backward("gru", *call, 0b1)
