"""The reset mask of the layer operators: rows whose state is zero before some of their steps, in the middle of a
sequence too. Against ``reference.layer``, whose own mask is held against sequences cut in pieces."""

from __future__ import annotations

import pytest
import torch
from test_ops import CELLS, make_layer, wanted_bits
from torch import Tensor

from fused_rnn import _C, ops, reference

Values = list[Tensor | None]


def mask_for(arguments: Values) -> Tensor:
    input = arguments[0]
    rows = input.shape[:-1].numel()
    return torch.randperm(rows) < (rows + 1) // 3  # at least one, and not all


def reset_by_operators(cell: str, arguments: Values, reset: Tensor) -> Values:
    """Results and, for gradients of ones of all of them, every gradient."""
    output, hn, cn, saved = ops.layer_forward(cell, *arguments, True, reset)
    ones = [torch.ones_like(r) if r.numel() > 0 else None for r in (output, hn, cn)]
    gradients = ops.layer_backward(
        cell, *ones, *arguments, output, saved, wanted_bits(arguments), None, reset
    )
    inference = ops.layer_forward(cell, *arguments, False, reset)
    assert all(torch.equal(a, b) for a, b in zip(inference[:3], (output, hn, cn), strict=True))
    return [output, hn, cn if cell == "lstm" else None, *gradients[:-1]]


def reset_by_reference(cell: str, arguments: Values, reset: Tensor) -> Values:
    leaves = [a if a is None or k == 1 else a.clone().requires_grad_() for k, a in enumerate(arguments)]
    results = reference.layer(cell, *leaves, reset=reset)
    torch.autograd.backward(sum(r.sum() for r in results if r is not None))
    gradients = [None if leaf is None else leaf.grad for k, leaf in enumerate(leaves) if k != 1]
    return [*(None if r is None else r.detach() for r in results), *gradients]


def assert_reset(cell: str, arguments: Values) -> None:
    """In float64: sums of some dozens of products, a few steps deep."""
    reset = mask_for(arguments)
    expected = reset_by_reference(cell, arguments, reset)
    for found, wanted in zip(reset_by_operators(cell, arguments, reset), expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "T, B, H, states", [(2, 1, 1, True), (1, 40, 9, False), (7, 5, 33, True), (30, 18, 20, False)]
)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", _C.isas())
def test_agrees_with_reference(
    isa: str, cell: str, T: int, B: int, H: int, states: bool, packed: bool, threads: int
) -> None:
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    for directions, proj in [(1, 0), (2, 0), *([(2, 5)] if cell == "lstm" and H > 5 else [])]:
        options = {"directions": directions, "proj": proj, "packed": packed, "states": states}
        assert_reset(cell, make_layer(cell, T, B, 6, H, **options))


@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_that_of_sequences_cut_in_pieces(cell: str) -> None:
    input, _, h0, c0, *weights = make_layer(cell, 9, 1, 4, 6)
    reset = torch.zeros(9, dtype=torch.bool)
    reset[[3, 4]] = True
    output, hn, cn = reference.layer(cell, input, None, h0, c0, *weights, reset=reset)
    pieces = [reference.layer(cell, input[:3], None, h0, c0, *weights)]
    pieces += [reference.layer(cell, part, None, None, None, *weights) for part in (input[3:4], input[4:])]
    torch.testing.assert_close(output, torch.cat([piece[0] for piece in pieces]))
    torch.testing.assert_close((hn, cn), pieces[-1][1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_other_dtypes(cell: str, dtype: torch.dtype) -> None:
    arguments = make_layer(cell, 12, 20, 16, 48, packed=True, dtype=dtype)
    exact = [a if a is None or k == 1 else a.double() for k, a in enumerate(arguments)]
    reset, bound = mask_for(arguments), 64 * torch.finfo(dtype).eps
    expected = reset_by_reference(cell, exact, reset)
    for found, wanted in zip(reset_by_operators(cell, arguments, reset), expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(
                found.double() / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=bound
            )


def test_a_mask_must_fit() -> None:
    arguments = make_layer("gru", 5, 3, 4, 6)
    with pytest.raises(RuntimeError, match="expected reset of dtype Bool, got Byte"):
        ops.layer_forward("gru", *arguments, False, torch.zeros(15, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"expected reset of size \[15\], got \[14\]"):
        ops.layer_forward("gru", *arguments, False, torch.zeros(14, dtype=torch.bool))
