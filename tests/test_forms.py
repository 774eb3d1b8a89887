"""Every form of input and of hx: results of the same form, shape, dtype, layout and value as torch.nn's.

Values are compared in float64, where a wrong element cannot pass for a rounding; the accuracy of each dtype
on each instruction set is the subject of test_parity_forward.py and test_parity_gradients.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from parity import (
    CELLS,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    Twins,
    assert_law,
    count_terms,
    make_input,
    make_state,
    make_twins,
    pack,
    run_all,
    tensors_of,
)
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

pytestmark = pytest.mark.filterwarnings("error", "ignore:LSTM with projections is not supported with oneDNN")

layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
cells = pytest.mark.parametrize("kind", CELLS, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def assert_same_layout(ours, theirs, *, strides: bool = True) -> None:
    """The same nesting of the same types, and tensors of the same metadata."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert ours.stride() == theirs.stride() or not strides
        assert ours.requires_grad == theirs.requires_grad and ours.is_leaf == theirs.is_leaf
    elif isinstance(ours, PackedSequence):
        assert_same_layout(ours.data, theirs.data, strides=strides)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            mine, its = getattr(ours, name), getattr(theirs, name)
            assert (mine is None) == (its is None), name
            assert mine is None or (torch.equal(mine, its) and mine.device == its.device), name
    elif ours is not None:
        assert len(ours) == len(theirs)
        for mine, its in zip(ours, theirs, strict=True):
            assert_same_layout(mine, its, strides=strides)


def make(kind, *sizes, **options) -> Twins:
    return make_twins(kind, *sizes, dtype=torch.float64, **options)


def compare(twins: Twins, x, hx=None, *, form=lambda x: x, strides: bool = True) -> None:
    """Layout and values, and that nothing that was passed in has been written to."""
    before = [tensor.detach().clone() for tensor in (x, *tensors_of(hx if hx is not None else ()))]
    args = (form(x),) if hx is None else (form(x), hx)
    assert_same_layout(twins.ours(*args), twins.theirs(*args), strides=strides)
    assert_law(run_all(twins, x, hx, form=form), terms=count_terms(twins.ours, x))
    for kept, tensor in zip(before, (x, *tensors_of(hx if hx is not None else ())), strict=True):
        assert torch.equal(kept, tensor)


# ----------------------------------------------------------------------------------------------- padded input

OPTIONS = [
    {"num_layers": layers_, "bidirectional": bidirectional, "batch_first": batch_first}
    for layers_ in (1, 2)
    for bidirectional in (False, True)
    for batch_first in (False, True)
]


@layers
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(int(v)) for v in o.values()))
@pytest.mark.parametrize("batch", [None, 1, 3], ids="batch={}".format)
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_padded(kind, options, batch, with_hx, device):
    twins = make(kind, device=device, **options)
    compare(twins, make_input(twins.ours, 4, batch), make_state(twins.ours, batch) if with_hx else None)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_of_zero(kind, batch_first, device):
    twins = make(kind, num_layers=2, bidirectional=True, batch_first=batch_first, device=device)
    x = make_input(twins.ours, 4, 0)
    compare(twins, x)
    compare(twins, x, make_state(twins.ours, 0))
    output, _ = twins.ours(x.requires_grad_())
    output.sum().backward()
    assert x.grad.shape == x.shape
    for name, weight in twins.ours.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


@layers
def test_one_step(kind, device):
    twins = make(kind, num_layers=2, bidirectional=True, device=device)
    compare(twins, make_input(twins.ours, 1, 3), make_state(twins.ours, 3))


@layers
def test_keyword_arguments_and_explicit_none(kind):
    ours = make(kind).ours
    x, hx = make_input(ours), make_state(ours)
    expected = tensors_of(ours(x, hx))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours(input=x, hx=hx)), expected, strict=True))
    expected = tensors_of(ours(x))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours(x, None)), expected, strict=True))


# ----------------------------------------------------------------------------------------- layouts of tensors


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in every other element of a larger tensor."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def reordered(x: torch.Tensor) -> torch.Tensor:
    """The same values, laid out with the dimensions in reverse order."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def offset(x: torch.Tensor) -> torch.Tensor:
    """The same values, at an address no wider than an element is aligned to."""
    return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """One row of the batch for all (stride 0 in a middle dimension, or the first)."""
    dim = max(x.dim() - 2, 0)
    return x.narrow(dim, 0, 1).expand_as(x)


layouts = pytest.mark.parametrize("layout", [strided, reordered, offset, expanded], ids=lambda f: f.__name__)


@kinds
@layouts
def test_layouts(kind, layout, device):
    twins = make(kind, device=device)
    x, hx = make_input(twins.ours), make_state(twins.ours)
    hx = tuple(layout(h) for h in hx) if kind.is_lstm else layout(hx)
    x = layout(x)
    compare(
        twins, x, hx, strides=not kind.is_cell
    )  # pointwise operations carry hx's strides over to the result


@layers
def test_packed_by_hand_with_steps_of_no_rows_at_the_end(kind):
    twins = make(kind)
    batch_sizes = torch.tensor([3, 1, 0, 0])
    compare(
        twins, torch.randn(4, 5, dtype=torch.float64), form=lambda data: PackedSequence(data, batch_sizes)
    )


@layers
@layouts
def test_layouts_of_packed_input(kind, layout):
    """pack_padded_sequence makes its own data; a PackedSequence built by hand may hold any."""
    twins = make(kind, bidirectional=True)
    data, batch_sizes = layout(torch.randn(7, 5, dtype=torch.float64)), torch.tensor([3, 2, 1, 1])
    compare(twins, data, make_state(twins.ours), form=lambda data: PackedSequence(data, batch_sizes))


@kinds
@layouts
def test_layouts_of_weights(kind, layout):
    twins = make(kind)

    def change(module):
        for weight in module.parameters():
            weight.data = layout(weight.data)

    compare(twins.apply(change), make_input(twins.ours), make_state(twins.ours))


# ----------------------------------------------------------------------------------------------------- packed


@layers
@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 3, 1], [1, 4, 2, 4], [1, 1], [3]], ids=str)
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed(kind, lengths, with_hx, batch_first, device):
    """batch_first of the module says nothing about packed input."""
    twins = make(kind, num_layers=2, bidirectional=True, batch_first=batch_first, device=device)
    x = make_input(twins.ours, max(lengths), len(lengths))
    hx = make_state(twins.ours, len(lengths)) if with_hx else None
    compare(twins, x, hx, form=pack(lengths, batch_first=batch_first))


@layers
def test_sorted_packed_input_carries_no_order(kind):
    twins = make(kind)
    x, hx = make_input(twins.ours, 4, 3), make_state(twins.ours, 3)
    compare(twins, x, hx, form=pack([4, 2, 1], enforce_sorted=True))
    output, _ = twins.ours(pack([4, 2, 1], enforce_sorted=True)(x), hx)
    assert output.sorted_indices is None and output.unsorted_indices is None


@layers
def test_packed_rows_are_the_rows_run_alone(kind):
    """Each sequence of an unsorted batch, hx and final state and all, as if it had been alone."""
    twins = make(kind, num_layers=2, bidirectional=True)
    ours, lengths = twins.ours, [2, 5, 1, 4]
    x, hx = make_input(ours, 5, 4), make_state(ours, 4)
    output, hidden = ours(pack(lengths)(x), hx)
    output, returned = pad_packed_sequence(output)
    assert returned.tolist() == lengths
    for row, length in enumerate(lengths):
        alone = ours(x[:length, row : row + 1], slice_rows(hx, row))
        together = (output[:length, row : row + 1], slice_rows(hidden, row))
        for mine, expected in zip(tensors_of(together), tensors_of(alone), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)
        assert not output[length:, row].any()


def slice_rows(hx, row: int):
    if isinstance(hx, tuple):
        return tuple(h[:, row : row + 1].contiguous() for h in hx)
    return hx[:, row : row + 1].contiguous()


@layers
def test_pack_sequence(kind):
    twins = make(kind)
    x = torch.randn(9, 5, dtype=torch.float64)
    compare(twins, x, form=lambda x: pack_sequence(x.split([2, 4, 3]), enforce_sorted=False))


# --------------------------------------------------------------------------------------------------------- hx


@pytest.mark.parametrize("kind", [LSTM, LSTM_PROJ, LSTM_CELL], ids=str)
def test_lstm_hx_may_be_a_list(kind):
    ours = make(kind).ours
    x, hx = make_input(ours), make_state(ours)
    for mine, expected in zip(tensors_of(ours(x, list(hx))), tensors_of(ours(x, hx)), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("kind", [LSTM, LSTM_CELL], ids=str)
def test_h0_and_c0_may_be_one_tensor(kind):
    twins = make(kind)
    hx = make_state(twins.ours)[0]
    compare(twins, make_input(twins.ours), (hx, hx))


@layers
def test_zeros_are_the_default_hx(kind):
    ours = make(kind, num_layers=2, bidirectional=True).ours
    x = make_input(ours)
    hx = make_state(ours)
    hx = tuple(torch.zeros_like(h) for h in hx) if kind.is_lstm else torch.zeros_like(hx)
    for mine, expected in zip(tensors_of(ours(x)), tensors_of(ours(x, hx)), strict=True):
        assert torch.equal(mine, expected)


@layers
def test_state_carries_over_a_split_sequence(kind):
    ours = make(kind, num_layers=2).ours
    x = make_input(ours, 7)
    whole, last = ours(x)
    first, middle = ours(x[:3])
    second, end = ours(x[3:], middle)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-13, atol=1e-13)
    for mine, expected in zip(tensors_of(end), tensors_of(last), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------- what is returned


@layers
@pytest.mark.parametrize("form", [lambda x: x, pack([4, 2, 3])], ids=["padded", "packed"])
@pytest.mark.parametrize("grad", [False, True], ids="grad={}".format)
@pytest.mark.parametrize("batch", [1, 3])
def test_final_states_own_their_memory(kind, form, grad, batch):
    """A state that is carried on must not keep a whole output alive, nor change with an edit of it."""
    ours = make(kind).ours
    x = make_input(ours, 4, batch)
    with torch.set_grad_enabled(grad):
        output, hidden = ours(form(x) if batch == 3 else x)
    output = tensors_of(output)[0]
    pointers = {output.untyped_storage().data_ptr()}
    for state in tensors_of(hidden):
        assert state.untyped_storage().nbytes() == state.numel() * state.element_size()
        assert state.untyped_storage().data_ptr() not in pointers
        pointers.add(state.untyped_storage().data_ptr())
    assert x.untyped_storage().data_ptr() not in pointers


@cells
def test_cell_results_own_their_memory(kind):
    ours = make(kind).ours
    x, hx = make_input(ours), make_state(ours)
    with torch.no_grad():
        results = tensors_of(ours(x, hx))
    pointers = {tensor.untyped_storage().data_ptr() for tensor in (x, *tensors_of(hx), *results)}
    assert len(pointers) == 1 + 2 * len(results)


@kinds
def test_results_require_grad_as_torchs_do(kind):
    twins = make(kind)
    x, hx = make_input(twins.ours), make_state(twins.ours)
    with torch.no_grad():
        assert_same_layout(twins.ours(x, hx), twins.theirs(x, hx))
    frozen = copy.deepcopy(twins).apply(lambda module: module.requires_grad_(False))
    assert_same_layout(frozen.ours(x, hx), frozen.theirs(x, hx))
    x.requires_grad_()
    assert_same_layout(frozen.ours(x, hx), frozen.theirs(x, hx))


# ------------------------------------------------------------------------------------------------------ cells


@cells
@pytest.mark.parametrize("batch", [None, 0, 1, 3], ids="batch={}".format)
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
@pytest.mark.parametrize("bias", [False, True], ids="bias={}".format)
def test_cells(kind, batch, with_hx, bias, device):
    twins = make(kind, bias=bias, device=device)
    compare(twins, make_input(twins.ours, batch=batch), make_state(twins.ours, batch) if with_hx else None)


@cells
@pytest.mark.parametrize("sizes", [(3, 0), (0, 5)], ids=str)
def test_cells_of_size_zero(kind, sizes):
    twins = make(kind, *sizes)
    compare(twins, make_input(twins.ours), make_state(twins.ours))
    compare(twins, make_input(twins.ours))
    compare(twins, make_input(twins.ours).requires_grad_())
