"""Properties over shapes and forms drawn by hypothesis, weighted to the edges: sizes of one, sizes that no
vector or tile divides, empty batches, rows of unequal length, tensors that are not contiguous.

Judged in float64, where a wrong element cannot pass for a rounding; and, for parity, in float32 by the law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from parity import (
    CELLS,
    LAYERS,
    LSTM_PROJ,
    Kind,
    Twins,
    assert_law,
    assert_parity,
    count_terms,
    make_input,
    make_state,
    make_twins,
    pack,
    run_all,
    tensors_of,
)
from torch import Tensor

from fused_rnn import _C

# Around the widths of vectors (2 to 16 elements) and of tiles, and the smallest.
SIZES = st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33])
BATCHES = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 9, 13])
STEPS = st.sampled_from([1, 1, 2, 3, 4, 6])
LAYOUTS = st.sampled_from(["contiguous", "strided", "reversed", "offset", "expanded"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another layout of memory; all of its rows become the first, if expanded."""
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "reversed":
        return x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    if layout == "offset":
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x)
    if layout == "expanded" and x.size(-2) > 0:
        return x.narrow(-2, 0, 1).expand_as(x)
    return x


@dataclass
class Case:
    """What is drawn: a module, and a call of it."""

    kind: Kind
    sizes: tuple[int, int]
    steps: int
    batch: int | None
    options: dict[str, Any]
    with_hx: bool
    lengths: list[int] | None
    layouts: tuple[str, str]
    isa: str
    seed: int

    def twins(self, dtype: torch.dtype) -> Twins:
        _C.set_isa(self.isa)
        return make_twins(self.kind, *self.sizes, dtype=dtype, seed=self.seed, **self.options)

    def inputs(self, twins: Twins) -> tuple[Tensor, Any]:
        """x and hx as leaves that require grad."""
        x = laid_out(make_input(twins.ours, self.steps, self.batch), self.layouts[0]).requires_grad_()
        if not self.with_hx:
            return x, None
        hx = make_state(twins.ours, self.batch)
        states = [laid_out(h, self.layouts[1]).requires_grad_() for h in tensors_of(hx)]
        return x, tuple(states) if self.kind.is_lstm else states[0]

    @property
    def how(self) -> dict[str, Any]:
        batch_first = self.options.get("batch_first", False)
        return {"form": pack(self.lengths, batch_first=batch_first)} if self.lengths else {}


@st.composite
def cases(draw, kinds=LAYERS + CELLS, packed: bool | None = None, batches=BATCHES) -> Case:
    kind = draw(st.sampled_from(kinds))
    input_size, hidden_size = draw(SIZES), draw(SIZES)
    steps, batch, lengths = draw(STEPS), draw(batches), None
    options: dict[str, Any] = {"bias": draw(st.booleans())}
    if not kind.is_cell:
        options |= {
            "num_layers": draw(st.sampled_from([1, 1, 2, 3])),
            "bidirectional": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
        }
        if kind is LSTM_PROJ:
            hidden_size = max(hidden_size, 2)
            options["proj_size"] = draw(st.integers(1, hidden_size - 1))
        packed = draw(st.booleans()) if packed is None else packed
        if packed:
            lengths = draw(st.lists(st.integers(1, steps), min_size=1, max_size=7))
            steps, batch = max(lengths), len(lengths)
    if lengths is None and draw(st.integers(0, 9)) == 0:
        batch = None
    layouts = (draw(LAYOUTS), draw(LAYOUTS)) if batch is not None else ("contiguous", "contiguous")
    return Case(
        kind=kind,
        sizes=(input_size, hidden_size),
        steps=steps,
        batch=batch,
        options=options,
        with_hx=draw(st.booleans()),
        lengths=lengths,
        layouts=layouts,
        isa=draw(st.sampled_from(_C.isas())),
        seed=draw(st.integers(0, 2**16)),
    )


@given(case=cases())
@settings(max_examples=1200)
def test_parity_in_float64(case):
    twins = case.twins(torch.float64)
    x, hx = case.inputs(twins)
    assert_law(run_all(twins, x, hx, **case.how), terms=count_terms(twins.ours, x))


@given(case=cases(batches=st.sampled_from([1, 2, 3, 5, 8, 9, 13])))
@settings(max_examples=200)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_by_the_law(dtype, case):
    _C.set_isa(case.isa)
    assert_parity(
        case.kind,
        case.sizes,
        case.steps,
        case.batch,
        gradients=False,
        draws=4,
        lengths=case.lengths,
        with_hx=case.with_hx,
        dtype=dtype,
        **{name: value for name, value in case.options.items() if name != "batch_first"},
    )


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(tensors_of(actual), tensors_of(expected), rtol=1e-12, atol=1e-12)


@given(case=cases(kinds=LAYERS, packed=False, batches=st.integers(1, 9)), data=st.data())
@settings(max_examples=200)
def test_rows_of_a_batch_do_not_meet(case, data):
    """The rows in another order, and any one of them alone."""
    ours = case.twins(torch.float64).ours
    ours.batch_first = False
    batch = case.batch or 1
    x, hx = make_input(ours, case.steps, batch), make_state(ours, batch)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    output, hidden = ours(x, hx)

    def rows(states, index):
        return ours.permute_hidden(states, index)

    assert_close(ours(x[:, order], rows(hx, order)), (output[:, order], rows(hidden, order)))
    row = order[:1]
    assert_close(ours(x[:, row], rows(hx, row)), (output[:, row], rows(hidden, row)))


@given(case=cases(kinds=LAYERS, packed=False, batches=st.integers(1, 5)), cut=st.integers(1, 5))
@settings(max_examples=150)
def test_a_sequence_may_be_cut(case, cut):
    """The state after the first part is all that the second part needs."""
    case.options["bidirectional"] = False
    ours = case.twins(torch.float64).ours
    ours.batch_first = False
    x = make_input(ours, cut + case.steps, case.batch)
    whole, end = ours(x)
    first, middle = ours(x[:cut])
    second, last = ours(x[cut:], middle)
    assert_close((torch.cat([first, second]), last), (whole, end))


@given(case=cases(kinds=LAYERS, packed=False, batches=st.integers(1, 5)))
@settings(max_examples=150)
def test_the_second_direction_is_the_first_on_the_sequence_backwards(case):
    case.options |= {"bidirectional": True, "num_layers": 1, "batch_first": False}
    both = case.twins(torch.float64).ours
    case.options["bidirectional"] = False
    one = case.twins(torch.float64).ours
    weights = both.state_dict()
    one.load_state_dict({name: weights[f"{name}_reverse"] for name in one.state_dict()})
    x = make_input(one, case.steps, case.batch)
    output, hidden = both(x)
    backwards, final = one(x.flip(0))
    assert_close(output[..., output.size(-1) // 2 :], backwards.flip(0))
    for mine, its in zip(tensors_of(hidden), tensors_of(final), strict=True):
        torch.testing.assert_close(mine[1], its[0], rtol=1e-12, atol=1e-12)


@given(case=cases(kinds=LAYERS, packed=True))
@settings(max_examples=200)
def test_packed_rows_are_the_rows_alone(case):
    ours = case.twins(torch.float64).ours
    ours.batch_first = False
    lengths = case.lengths
    x, hx = make_input(ours, max(lengths), len(lengths)), make_state(ours, len(lengths))
    output, hidden = ours(pack(lengths)(x), hx)
    output, returned = torch.nn.utils.rnn.pad_packed_sequence(output)
    assert returned.tolist() == lengths
    for row, length in enumerate(lengths):
        index = torch.tensor([row])
        alone = ours(x[:length, index], ours.permute_hidden(hx, index))
        note(f"row {row} of length {length}")
        assert_close((output[:length, index], ours.permute_hidden(hidden, index)), alone)
        assert not output[length:, row].any()


@given(case=cases(kinds=LAYERS, packed=False, batches=st.integers(1, 6)))
@settings(max_examples=200)
def test_packed_at_equal_lengths_is_padded(case):
    ours = case.twins(torch.float64).ours
    ours.batch_first = False
    batch = case.batch or 2
    x, hx = make_input(ours, case.steps, batch), make_state(ours, batch)
    output, hidden = ours(x, hx)
    packed, its_hidden = ours(pack([case.steps] * batch)(x), hx)
    assert_close((packed.data.view_as(output), its_hidden), (output, hidden))


@given(case=cases(), scale=st.sampled_from([1e-3, 1.0, 20.0]))
@settings(max_examples=200)
def test_states_stay_in_their_range(case, scale):
    """|h| <= 1 but for relu and projections, whatever the input: tanh and sigmoid overshoot by nothing."""
    ours = case.twins(torch.float32).ours
    x, _ = case.inputs(Twins(case.kind, ours, ours, ours))
    with torch.no_grad():
        for tensor in tensors_of(ours(x * scale))[:2]:
            assert torch.isfinite(tensor).all()
            bounded = not case.kind.options and not case.kind.is_cell
            assert not bounded or tensor.abs().le(1).all()
