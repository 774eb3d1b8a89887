"""The raw operators: schemas and fakes (opcheck), refusal of wrong calls, and agreement with ``reference.py``.

Also the tests that `make asan` runs: every operator, both directions of time, odd sizes, packed and padded.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fused_rnn import ops, reference

CELLS = list(ops.CELLS)
GATES = {name: traits.gates for name, traits in ops.CELLS.items()}


def batch_sizes_of(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])


def make_layer(
    cell: str,
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    directions: int = 1,
    proj: int = 0,
    bias: bool = True,
    packed: bool = False,
    states: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """Arguments of layer_forward after `cell`: input, batch_sizes, h0, c0, ten weights."""
    rows, state = GATES[cell] * H, proj or H

    def new(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, dtype=torch.float64).mul(scale).to(dtype)

    def one_direction() -> list[Tensor | None]:
        scale = H**-0.5  # torch's initial weights are of this size, and a relu recurrence does not explode
        return [
            new(rows, I, scale=scale),
            new(rows, state, scale=scale),
            new(rows, scale=scale) if bias else None,
            new(rows, scale=scale) if bias else None,
            new(proj, H, scale=scale) if proj else None,
        ]

    weights = [w for _ in range(directions) for w in one_direction()] + [None] * (5 * (2 - directions))
    sizes = batch_sizes_of([1 + (7 * b) % T for b in range(B - 1)] + [T]) if packed else None
    input = new(int(sizes.sum()), I) if packed else new(T, B, I)
    h0 = new(directions, B, state) if states else None
    c0 = new(directions, B, H) if states and cell == "lstm" else None
    return [input, sizes, h0, c0, *weights]


def wanted_bits(arguments: list[Tensor | None]) -> int:
    """All gradients that exist: of input, h0, c0 and every weight present (batch_sizes has none)."""
    differentiable = [a for k, a in enumerate(arguments) if k != 1]
    return sum(1 << k for k, a in enumerate(differentiable) if a is not None)


SMALL = {"T": 5, "B": 3, "I": 4, "H": 6}
LAYER_CASES = [
    pytest.param(cell, {**SMALL, "directions": d, "proj": p, "packed": packed, "states": states}, id=name)
    for cell, d, packed, states in itertools.product(CELLS, (1, 2), (False, True), (False, True))
    for p in ((0, 2) if cell == "lstm" else (0,))
    for name in [
        f"{cell}-{d}dir{'-proj' if p else ''}{'-packed' if packed else ''}{'' if states else '-zero'}"
    ]
]


@pytest.mark.parametrize("cell, sizes", LAYER_CASES)
def test_layer_operators_pass_opcheck(cell: str, sizes: dict) -> None:
    arguments = make_layer(cell, **sizes)
    tests = ("test_schema", "test_faketensor")  # autograd is not theirs: see fused_rnn/autograd.py
    torch.library.opcheck(ops.layer_forward, (cell, *arguments, True), test_utils=tests)
    output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
    gradients = [
        torch.randn_like(output),
        torch.randn_like(hn),
        torch.randn_like(cn) if cell == "lstm" else None,
    ]
    call = (cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
    torch.library.opcheck(ops.layer_backward, call, test_utils=tests)


@pytest.mark.parametrize("cell", CELLS)
def test_cell_operators_pass_opcheck(cell: str) -> None:
    input, _, h0, c0, *weights = make_layer(cell, 1, 3, 4, 6)
    states = [h0[0], c0[0] if c0 is not None else None]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.cell_forward, (cell, input[0], *states, *weights[:4], True), test_utils=tests)
    h, c, saved = ops.cell_forward(cell, input[0], *states, *weights[:4], True)
    gradients = [torch.randn_like(h), torch.randn_like(c) if cell == "lstm" else None]
    call = (
        cell,
        *gradients,
        input[0],
        *states,
        *weights[:4],
        h,
        saved,
        0b1111111 if cell == "lstm" else 0b1111011,
    )
    torch.library.opcheck(ops.cell_backward, call, test_utils=tests)


def gradients_by_reference(
    cell: str, arguments: list[Tensor | None], gradients: list[Tensor | None]
) -> list[Tensor | None]:
    leaves = [a.detach().requires_grad_() if a is not None and k != 1 else a for k, a in enumerate(arguments)]
    results = reference.layer(cell, *leaves)
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None]
    torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
    return [None if leaf is None else leaf.grad for k, leaf in enumerate(leaves) if k != 1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("T, B, I, H", [(1, 1, 1, 1), (3, 2, 5, 7), (4, 19, 3, 33), (2, 5, 9, 130)])
@pytest.mark.parametrize("cell, sizes", LAYER_CASES)
def test_layer_agrees_with_reference(
    cell: str, sizes: dict, T: int, B: int, I: int, H: int, threads: int
) -> None:
    if sizes["proj"] >= H:
        sizes = {**sizes, "proj": 0}
    arguments = make_layer(cell, **{**sizes, "T": T, "B": B, "I": I, "H": H})
    torch.set_num_threads(threads)
    output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
    expected = reference.layer(cell, *arguments)
    # float64: sums of up to I + H products, T steps deep; 1e-12 is thousands of roundings of values of order 1
    torch.testing.assert_close((output, hn), expected[:2], rtol=1e-12, atol=1e-12)
    if cell == "lstm":
        torch.testing.assert_close(cn, expected[2], rtol=1e-12, atol=1e-12)
    inference = ops.layer_forward(cell, *arguments, False)
    assert torch.equal(inference[0], output)
    assert torch.equal(inference[1], hn)
    assert inference[3].numel() == 0, "inference must save nothing"

    gradients = [
        torch.randn_like(output),
        torch.randn_like(hn),
        torch.randn_like(cn) if cell == "lstm" else None,
    ]
    needs = wanted_bits(arguments)
    found = ops.layer_backward(cell, *gradients, *arguments, output, saved, needs)
    for k, (ours, theirs) in enumerate(
        zip(found[:-1], gradients_by_reference(cell, arguments, gradients), strict=True)
    ):
        if not needs >> k & 1:
            assert ours is None
            continue
        torch.testing.assert_close(
            ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, k=k: f"gradient {k}: {m}"
        )


@pytest.mark.parametrize("only", range(14))
def test_backward_computes_what_is_wanted_and_no_more(only: int) -> None:
    arguments = make_layer("lstm", 3, 2, 4, 5, directions=2, proj=2, packed=True)
    output, hn, cn, saved = ops.layer_forward("lstm", *arguments, True)
    gradients = (torch.randn_like(output), torch.randn_like(hn), torch.randn_like(cn))
    all_of_them = ops.layer_backward("lstm", *gradients, *arguments, output, saved, (1 << 14) - 1)
    found = ops.layer_backward("lstm", *gradients, *arguments, output, saved, 1 << only)
    assert [g is not None for g in found] == [k == only for k in range(14)]
    assert torch.equal(found[only], all_of_them[only])


@pytest.mark.parametrize("absent", range(3))
def test_an_absent_gradient_counts_as_zero(absent: int) -> None:
    arguments = make_layer("lstm", 3, 2, 4, 5)
    output, hn, cn, saved = ops.layer_forward("lstm", *arguments, True)
    gradients = [torch.randn_like(output), torch.randn_like(hn), torch.randn_like(cn)]
    needs = wanted_bits(arguments)
    without = [None if k == absent else g for k, g in enumerate(gradients)]
    with_zero = [torch.zeros_like(g) if k == absent else g for k, g in enumerate(gradients)]
    for a, b in zip(
        ops.layer_backward("lstm", *without, *arguments, output, saved, needs),
        ops.layer_backward("lstm", *with_zero, *arguments, output, saved, needs),
        strict=True,
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_empty_batch(cell: str, packed: bool) -> None:
    arguments = make_layer(cell, 3, 1, 4, 5)
    input, sizes = (torch.empty(0, 4).double(), torch.zeros(3, dtype=torch.long)) if packed else (None, None)
    arguments[0] = input if packed else arguments[0][:, :0]
    arguments[1] = sizes
    arguments[2] = arguments[2][:, :0]
    arguments[3] = None if arguments[3] is None else arguments[3][:, :0]
    output, hn, _, saved = ops.layer_forward(cell, *arguments, True)
    assert output.shape == ((0, 5) if packed else (3, 0, 5))
    assert hn.shape == (1, 0, 5)
    found = ops.layer_backward(
        cell, torch.zeros_like(output), None, None, *arguments, output, saved, wanted_bits(arguments)
    )
    assert found[0].shape == arguments[0].shape
    assert torch.equal(found[3], torch.zeros_like(arguments[4]))


# Each entry breaks one argument of a correct call: (position in make_layer's list, new value from old, words expected)
WRONG = {
    "rank of input": (0, lambda t: t[0], "3-D"),
    "no steps": (0, lambda t: t[:0], "larger than 0"),
    "input size": (0, lambda t: t[..., :-1], "input of size"),
    "dtype": (0, lambda t: t.to(torch.complex64), "unsupported dtype"),
    "integers": (0, lambda t: t.long(), "unsupported dtype"),
    "dtype of a weight": (5, lambda t: t.to(torch.float16), "w_hh of dtype"),
    "h0 size": (2, lambda t: t[..., :-1], "h0 of size"),
    "h0 batch": (2, lambda t: t[:, :-1], "h0 of size"),
    "c0 size": (3, lambda t: t[..., :-1], "c0 of size"),
    "w_hh rows": (5, lambda t: t[:-1], "of size"),
    "w_hh rank": (5, lambda t: t[0], "2-D"),
    "one bias": (6, lambda t: None, "biases"),
    "bias size": (7, lambda t: t[:-1], "b_hh of size"),
    "a projection in one direction": (8, lambda t: torch.zeros(2, 6).double(), "w_h. of size"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_refused(what: str) -> None:
    position, change, words = WRONG[what]
    arguments = make_layer("lstm", 3, 2, 4, 6, directions=2)
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=words):
        ops.layer_forward("lstm", *arguments, True)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (torch.tensor([2, 3]), "must not increase"),
        (torch.tensor([3, -1]), "must not be negative"),
        (torch.tensor([3, 3]), "add up to 6 rows, got 5"),
        (torch.tensor([3.0, 2.0]), "int64"),
        (torch.tensor([], dtype=torch.long), "non-empty"),
        (torch.tensor([[3, 2]]), "1-D"),
    ],
)
def test_wrong_batch_sizes_are_refused(sizes: Tensor, words: str) -> None:
    _, _, _, _, *weights = make_layer("gru", 2, 3, 4, 6)
    with pytest.raises(RuntimeError, match=words):
        ops.layer_forward("gru", torch.randn(5, 4).double(), sizes, None, None, *weights, False)


def test_unknown_cell_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="unknown cell 'qrnn'"):
        ops.layer_forward("qrnn", *make_layer("gru", 2, 1, 3, 4), False)


@pytest.mark.parametrize("which", ["output", "saved", "grad_output", "input"])
def test_wrong_tensors_are_refused_in_backward(which: str) -> None:
    arguments = make_layer("gru", 3, 2, 4, 6)
    output, _, _, saved = ops.layer_forward("gru", *arguments, True)
    grad_output = torch.randn_like(output)
    if which == "output":
        output = output[..., :-1]
    elif which == "saved":
        saved = saved[..., :-1]
    elif which == "grad_output":
        grad_output = grad_output[:-1]
    else:
        arguments[0] = None
    with pytest.raises(RuntimeError, match=r"fused_rnn|is invalid for input of size"):
        ops.layer_backward("gru", grad_output, None, None, *arguments, output, saved, (1 << 8) - 1)
