"""Accuracy of the forward pass, on every instruction set and the GPU: the tolerance law of parity.py.

Each case is drawn several times from different seeds and judged by the largest errors over all draws: see
`assert_parity`.
"""

from __future__ import annotations

import pytest
import torch
from parity import (
    CELLS,
    DTYPES,
    GRU,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_PROJ,
    RNN,
    Twins,
    assert_equal,
    assert_law,
    assert_parity,
    count_terms,
    make_input,
    make_state,
    make_twins,
    named_outputs,
    pack,
    run,
    tensors_of,
)
from torch import nn

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def assert_forward(kind, sizes, steps, batch, **options) -> None:
    assert_parity(kind, sizes, steps, batch, gradients=False, **options)


# ----------------------------------------------------------------------------------------------- the ordinary


@kinds
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids="bias={}".format)
def test_one_layer(kind, dtype, bias, backend):
    assert_forward(kind, (6, 10), 5, 4, dtype=dtype, device=backend, bias=bias)


@layers
@dtypes
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 4]], ids=["padded", "packed"])
def test_layers_and_directions(kind, dtype, lengths, backend):
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype, "device": backend}
    assert_forward(kind, (6, 10), 5, 4, lengths=lengths, **options)


@layers
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
@pytest.mark.parametrize("batch_first", [False, True])
def test_bidirectional_by_batch(kind, with_hx, batch_first, backend):
    """Kernels split the work by units or by rows according to the batch."""
    for batch in (1, 2, 7, 19):
        options = {"bidirectional": True, "batch_first": batch_first, "device": backend}
        assert_forward(kind, (3, 9), 4, batch, with_hx=with_hx, draws=4, **options)


# Around every multiple that a kernel may unroll or vectorise by, and a few it may tile by.
WIDTHS = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 129]


@kinds
@pytest.mark.parametrize("hidden_size", WIDTHS)
def test_hidden_sizes(kind, hidden_size, backend):
    options = {"proj_size": hidden_size - hidden_size // 3} if kind is LSTM_PROJ else {}
    if options.get("proj_size", 0) >= hidden_size:
        options = {"proj_size": 0}  # the projection must be narrower than the state: none for size 1 and 2
    assert_forward(
        kind, (5, hidden_size), 3, 3, draws=3 if hidden_size > 4 else 16, device=backend, **options
    )


@kinds
@pytest.mark.parametrize("input_size", [1, 2, 8, 15, 17, 64, 129])
def test_input_sizes(kind, input_size, backend):
    assert_forward(kind, (input_size, 11), 3, 3, draws=4, device=backend)


@layers
@pytest.mark.parametrize(("steps", "batch", "size"), [(60, 3, 24), (20, 33, 40), (1, 130, 48)], ids=str)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(kind, steps, batch, size, threads, backend):
    torch.set_num_threads(threads)
    assert_forward(kind, (size, size), steps, batch, draws=1, device=backend)


@layers
@dtypes
def test_long_sequence(kind, dtype, backend):
    """Errors are carried from step to step, and must not grow faster than torch.nn's."""
    assert_forward(kind, (4, 12), 300, 2, draws=3, dtype=dtype, device=backend)


@layers
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 1, 1, 1], [1, 1, 9], [7, 3, 9, 5, 5, 2, 8]], ids=str)
def test_packed(kind, lengths, backend):
    assert_forward(kind, (6, 18), 9, len(lengths), lengths=lengths, bidirectional=True, device=backend)


@layers
def test_packed_on_threads(kind, backend):
    torch.set_num_threads(2)
    assert_forward(
        kind, (6, 40), 9, 7, lengths=[7, 3, 9, 5, 5, 2, 8], draws=2, bidirectional=True, device=backend
    )


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ], ids=str)  # no relu of complex numbers exists
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex(kind):
    """Through the reference path: no kernel computes on complex numbers."""
    assert_forward(kind, (4, 6), 4, 3, dtype=torch.complex64, bidirectional=True)


# ----------------------------------------------------------------------------------------------- the extremes


@kinds
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 30.0, 1e4, 1e30], ids=str)
def test_scales_of_input(kind, scale, backend):
    """From where tanh(x) is x to where every gate is shut or open."""
    assert_forward(kind, (4, 6), 4, 3, change_input=lambda x: x * scale, device=backend, with_hx=False)


@kinds
@dtypes
def test_saturated_gates_are_finite(kind, dtype, backend):
    """exp() of what is fed here overflows in every dtype."""
    if kind.options.get("nonlinearity") == "relu":
        largest = {torch.float16: 10.0}.get(dtype, 1e4)  # relu grows with its input: stay inside the dtype
    else:
        largest = min(torch.finfo(dtype).max / 16, 1e30)
    assert_forward(kind, (4, 6), 3, 3, change_input=lambda x: x.sign() * largest, dtype=dtype, device=backend)


def mark_not_finite(values) -> dict[str, torch.Tensor]:
    return {
        name: torch.where(torch.isnan(v), 2, torch.where(torch.isinf(v), 1, 0)) for name, v in values.items()
    }


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids="grad={}".format)
def test_not_finite_input_spreads_as_in_torch(kind, value, grad, backend):
    """Along its row, from its step on, and nowhere else; a saturated gate may swallow an infinite one."""
    twins = make_twins(kind, 4, 20, device=backend)
    x = make_input(twins.ours, 5, 6)
    x[(2, 3, 1) if x.dim() == 3 else (3, 1)] = value
    with torch.set_grad_enabled(grad):
        mine, its = (dict(enumerate(tensors_of(module(x)))) for module in (twins.ours, twins.theirs))
    assert_equal(mark_not_finite(mine), mark_not_finite(its))
    for name, tensor in mine.items():
        finite = torch.isfinite(tensor)
        torch.testing.assert_close(tensor[finite], its[name][finite])


@layers
def test_not_finite_row_of_a_packed_batch(kind, backend):
    twins = make_twins(kind, 4, 20, bidirectional=True, device=backend)
    x = make_input(twins.ours, 5, 4)
    x[1, 2, 0] = float("nan")
    form = pack([2, 5, 3, 4])
    mine, its = (dict(enumerate(tensors_of(module(form(x))))) for module in (twins.ours, twins.theirs))
    assert any(torch.isnan(tensor).any() for tensor in mine.values())
    assert_equal(mark_not_finite(mine), mark_not_finite(its))


@kinds
def test_subnormal_state(kind, backend):
    """A state that has decayed to the edge of float32 is as good as zero, and no trap."""
    twins = make_twins(kind, 4, 12, device=backend)
    x, hx = torch.zeros_like(make_input(twins.ours)), make_state(twins.ours)
    hx = tuple(h * 1e-40 for h in hx) if kind.is_lstm else hx * 1e-40
    for mine, its in zip(tensors_of(twins.ours(x, hx)), tensors_of(twins.theirs(x, hx)), strict=True):
        torch.testing.assert_close(mine, its)


# -------------------------------------------------------------------------------------------- same every time


@kinds
@dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_bit_identical_from_run_to_run(kind, dtype, threads, backend):
    torch.set_num_threads(threads)
    options = {} if kind.is_cell else {"num_layers": 2, "bidirectional": True}
    ours = make_twins(kind, 30, 40, dtype=dtype, device=backend, **options).ours
    x, hx = make_input(ours, 5, 9), make_state(ours, 9)
    first = run(ours, x, hx)
    for _ in range(3):
        assert_equal(run(ours, x, hx), first)


@kinds
def test_training_flag_changes_nothing_without_dropout(kind, backend):
    ours = make_twins(kind, device=backend).ours
    x = make_input(ours)
    training = run(ours, x)
    assert_equal(run(ours.eval(), x), training)


@kinds
def test_recording_a_graph_changes_no_bit(kind, backend):
    ours = make_twins(kind, 9, 21, device=backend).ours
    x = make_input(ours, 6, 5)
    with torch.no_grad():
        expected = tensors_of(ours(x))
    for mine, value in zip(tensors_of(ours(x)), expected, strict=True):
        assert torch.equal(mine, value)


# ---------------------------------------------------------------------------------------------------- dropout


def dropout_twins(kind, p: float, dtype=torch.float32, **options) -> Twins:
    return make_twins(kind, 6, 10, dtype=dtype, num_layers=3, dropout=p, **options)


def run_seeded(module: nn.Module, x, hx, form) -> dict:
    torch.manual_seed(77)
    return run(module, x, hx, form=form)


@layers
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 4]], ids=["padded", "packed"])
def test_dropout_masks_are_torchs(kind, p, bidirectional, batch_first, lengths):
    """From the same seed, bit for bit: seen in float64, where a mask that differs in one place differs by far
    more than rounding. float64 and float32 draw the same masks, on both sides."""
    twins = dropout_twins(kind, p, torch.float64, bidirectional=bidirectional, batch_first=batch_first)
    x, hx = make_input(twins.ours, 5, 4), make_state(twins.ours, 4)
    form = pack(lengths, batch_first=batch_first) if lengths else (lambda x: x)
    ours = run_seeded(twins.ours, x, hx, form)
    state_of_ours = torch.get_rng_state()
    theirs = run_seeded(twins.theirs, x, hx, form)
    assert torch.equal(state_of_ours, torch.get_rng_state()), "a different number of random numbers was drawn"
    assert_law((ours, theirs, theirs), terms=count_terms(twins.ours, x))


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_in_each_dtype(kind, dtype):
    """The float64 reference draws other masks than a 16-bit type does, so the masks are handed to it."""
    runs = []
    for seed in range(16):
        twins = dropout_twins(kind, 0.4, dtype, seed=seed)
        x, hx = make_input(twins.ours, 5, 4), make_state(twins.ours, 4)
        for module in (twins.ours, twins.theirs):
            module.requires_grad_(False)
        mine, its = (run_seeded(module, x, hx, lambda x: x) for module in (twins.ours, twins.theirs))
        runs.append((mine, its, run_with_masks(twins, x, hx)))
    assert_law(*runs)


def run_with_masks(twins: Twins, x, hx) -> dict:
    """The float64 twin, a layer at a time, with the masks that its narrower twins draw between layers."""
    exact, width, stack = twins.exact, x.size(-1), []
    for k in range(exact.num_layers):
        layer = twins.kind.theirs(width, exact.hidden_size, dtype=torch.float64, **twins.kind.options)
        weights = {name: weight for name, weight in exact.state_dict().items() if name.endswith(f"_l{k}")}
        layer.load_state_dict({name.replace(f"_l{k}", "_l0"): weight for name, weight in weights.items()})
        stack.append(layer.requires_grad_(False))
        width = exact.proj_size or exact.hidden_size
    torch.manual_seed(77)  # now, since constructors draw numbers of their own
    value, finals = x.double(), []
    for k, layer in enumerate(stack):
        if k > 0:  # with 1 / (1 - p) as the narrow type holds it
            value = (
                value * torch.dropout(torch.ones(value.shape, dtype=x.dtype), exact.dropout, True).double()
            )
        hidden = [h[k : k + 1].double() for h in tensors_of(hx)]
        value, final = layer(value, tuple(hidden) if twins.kind.is_lstm else hidden[0])
        finals.append(tensors_of(final))
    return named_outputs(exact, [value, *(torch.cat(parts) for parts in zip(*finals, strict=True))])


@layers
def test_no_dropout_in_eval_mode_or_after_the_last_layer(kind):
    twins = dropout_twins(kind, 1.0)
    x = make_input(twins.ours)
    state = torch.get_rng_state()
    quiet = twins.ours.eval()(x)
    assert torch.equal(state, torch.get_rng_state())
    twins.ours.dropout = 0.0
    for mine, its in zip(tensors_of(quiet), tensors_of(twins.ours.train()(x)), strict=True):
        assert torch.equal(mine, its)
    # with all below it zeroed, the last layer still computes: from its biases
    twins.ours.dropout = 1.0
    output, _ = twins.ours(x)
    assert output.any()


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_dropout_may_be_changed(kind):
    twins = dropout_twins(kind, 0.0, torch.float64)
    x = make_input(twins.ours)
    twins.apply(lambda module: setattr(module, "dropout", 0.3))
    runs = tuple(run_seeded(module, x, None, lambda x: x) for module in twins)
    assert_law(runs, terms=count_terms(twins.ours, x))


@pytest.mark.parametrize("kind", CELLS, ids=str)
def test_a_cell_unrolled_is_a_layer(kind, backend):
    """The two of them share weights: one layer of torch.nn's over a sequence is its cell, step by step."""
    cell = make_twins(kind, 5, 9, dtype=torch.float64, device=backend).ours
    names = {"RNNCell": RNN, "GRUCell": GRU, "LSTMCell": LSTM}
    layer = names[kind.cls].ours(5, 9, dtype=torch.float64, device=backend, **kind.options)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    x, hx = torch.randn(6, 3, 5, dtype=torch.float64, device=backend), None
    outputs = []
    for step in x:
        hx = cell(step, hx)
        outputs.append(tensors_of(hx)[0])
    output, hidden = layer(x)
    torch.testing.assert_close(torch.stack(outputs), output, rtol=1e-13, atol=1e-13)
    for mine, its in zip(tensors_of(hx), tensors_of(hidden), strict=True):
        torch.testing.assert_close(mine, its[0], rtol=1e-13, atol=1e-13)
