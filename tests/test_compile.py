"""torch.compile captures our layers whole: no graph break, no recompilation for another length, the numbers of eager
mode.

All of it asked of ``aot_eager``, which captures, differentiates and lowers a graph and then runs it as it is: results
are the same bits. tests/test_compile_models.py asks inductor, which makes code of it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from compiling import assert_compiles, assert_same, no_recompiles, whole
from parity import (
    CLASSES,
    GRU,
    GRU_CELL,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    RNN_CELL,
    Kind,
    leaves,
    make_input,
    make_state,
    make_twins,
    pack,
    run,
    tensors_of,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own remark, about itself

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)

DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- forms


@kinds
@pytest.mark.parametrize("batch, with_hx", [(3, False), (3, True), (None, True)])
def test_all_classes(kind: Kind, batch: int | None, with_hx: bool, device: str):
    ours = make_twins(kind, device=device).ours
    assert_compiles(ours, *leaves(ours, 4, batch, with_hx=with_hx))


@layers
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_deep_layers(kind: Kind, with_hx: bool, device: str):
    ours = make_twins(kind, device=device, **DEEP).ours
    assert_compiles(ours, *leaves(ours, 4, 3, with_hx=with_hx))


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN_CELL], ids=str)
def test_without_bias(kind: Kind, device: str):
    ours = make_twins(kind, device=device, bias=False).ours
    assert_compiles(ours, *leaves(ours, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [LSTM, GRU_CELL], ids=str)
def test_dtypes(kind: Kind, dtype: torch.dtype, device: str):
    ours = make_twins(kind, device=device, dtype=dtype).ours
    assert_compiles(ours, *leaves(ours, 4, 3))


@layers
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_packed_sequence(kind: Kind, with_hx: bool, device: str):
    """A PackedSequence goes in, and one comes out. Sequences in order of length carry no indices."""
    ours = make_twins(kind, device=device).ours
    form = pack([2, 4, 3]) if with_hx else pack([4, 3, 2], enforce_sorted=True)
    x, hx = leaves(ours, 4, 3, with_hx=with_hx)
    assert_compiles(ours, x, hx, form=form)


@pytest.mark.parametrize("kind, with_hx", [(LSTM_PROJ, True), (GRU, True), (GRU, False)], ids=str)
def test_packed_sequence_through_deep_layers(kind: Kind, with_hx: bool, device: str):
    ours = make_twins(kind, device=device, num_layers=2, bidirectional=True).ours
    x, hx = leaves(ours, 4, 3, with_hx=with_hx)
    assert_compiles(ours, x, hx, form=pack([2, 4, 3]))


@pytest.mark.parametrize("kind", [LSTM, GRU], ids=str)
def test_rows_and_batch_sizes(kind: Kind, device: str):
    """The packed form without its wrapper, made inside the graph."""
    ours = make_twins(kind, device=device).ours

    def rows(data: Tensor, batch_sizes: Tensor) -> Tensor:
        return ours(PackedSequence(data, batch_sizes))[0].data

    x, sizes = torch.randn(9, 5, device=device), torch.tensor([3, 3, 2, 1])
    inputs = [x.requires_grad_(), *ours.parameters()]
    expected, found = rows(x, sizes), whole(rows)(x, sizes)
    assert torch.equal(found, expected)
    for ours_grad, its in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert torch.equal(ours_grad, its)


@pytest.mark.parametrize("batch", [2, 4])
def test_packed_sequence_with_hx_of_another_batch(batch: int, device: str):
    """The size of a packed batch is data: an hx that has too many rows is found out all the same."""
    ours = make_twins(LSTM, device=device, num_layers=2).ours
    compiled = whole(ours)
    x = torch.randn(4, 3, 5, device=device)
    compiled(pack([2, 4, 3])(x), make_state(ours, 3))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 3, 7\)"):
        compiled(pack([2, 4, 3])(x), make_state(ours, batch))
    with pytest.raises(RuntimeError, match="h0 of size"):  # nothing but batch_sizes tells: the operator does
        compiled(pack([4, 3, 2], enforce_sorted=True)(x), make_state(ours, batch))


def test_one_tensor_in_several_places(device: str):
    """h and c begin as one tensor of zeros, and weights are tied: autograd.Function alone would be refused."""
    cell = make_twins(LSTM_CELL, 7, 7, device=device).ours
    cell.weight_hh, cell.bias_hh = cell.weight_ih, cell.bias_ih
    x = torch.randn(5, 3, 7, device=device).requires_grad_()

    def steps(x: Tensor) -> Tensor:
        h = c = x.new_zeros(3, 7)
        outputs = []
        for step in x.unbind(0):
            h, c = cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs)

    inputs = [x, *cell.parameters()]
    expected = torch.autograd.grad(steps(x).sin().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(whole(steps)(x).sin().sum(), inputs), expected)


@pytest.mark.parametrize("through", [["output"], ["h_n"], ["c_n"]], ids=lambda names: names[0])
def test_some_gradients_only(through: list[str], device: str):
    """Of some outputs, for some weights."""
    ours = make_twins(LSTM, device=device, num_layers=2).ours
    ours.weight_ih_l0.requires_grad_(False)
    ours.bias_hh_l1.requires_grad_(False)
    x, hx = leaves(ours, 4, 3)
    x.requires_grad_(False)
    hx[1].requires_grad_(False)
    expected = run(ours, x, hx, through=through)
    assert_same(run(ours, x, hx, through=through, call=whole(ours)), expected)


# -------------------------------------------------------------------------------------------------- what it becomes


def graphs_of(module: nn.Module, x, *, backward: bool) -> list[list[str]]:
    """The operators, by name, of the graphs that the module is lowered to."""
    found: list[list[str]] = []

    def keep(graph: GraphModule, inputs) -> Callable:
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph)

    result = whole(module, aot_autograd(fw_compiler=keep, bw_compiler=keep))(x)
    if backward:
        tensors_of(result)[0].sum().backward()
    return found


@kinds
def test_one_operator_a_layer_and_direction_of_time(kind: Kind, device: str):
    """Nothing is unrolled, recomputed or, when nothing records, kept for a backward pass that never comes."""
    options = {} if kind.is_cell else {"num_layers": 2, "bidirectional": True}
    ours = make_twins(kind, device=device, **options).ours
    x, count = make_input(ours), 1 if kind.is_cell else 2
    forward, backward = graphs_of(ours, x, backward=True)

    def ours_in(graph: list[str]) -> list[str]:
        return [name for name in graph if name.startswith("fused_rnn")]

    name = "cell" if kind.is_cell else "layer"
    assert ours_in(forward) == [f"fused_rnn.{name}_forward.default"] * count
    assert ours_in(backward) == [f"fused_rnn.{name}_backward.default"] * count
    assert not [name for name in forward + backward if "mm" in name], "a product outside the kernels"


@classes
def test_inference_saves_nothing(kind: Kind, device: str):
    ours = make_twins(kind, device=device).ours
    saves: list[bool] = []

    def look(graph: GraphModule, inputs) -> Callable:
        saves.extend(node.args[-1] for node in graph.graph.nodes if str(node.target).startswith("fused_rnn"))
        return make_boxed_func(graph)

    compiled = whole(ours, aot_autograd(fw_compiler=look))
    with torch.no_grad():
        compiled(make_input(ours))
    assert saves == [False]


@layers
def test_what_is_put_into_flat_weights_is_used(kind: Kind, device: str):
    """By a forward of one's own, as adapters do it."""
    ours = make_twins(kind, device=device).ours
    adapter = torch.randn_like(ours.weight_ih_l0).requires_grad_()

    def adapted(x: Tensor):
        weights = [getattr(ours, name) for name in ours._flat_weights_names]
        ours._flat_weights = [weights[0] + adapter, *weights[1:]]
        return ours(x)[0]

    x = make_input(ours)
    expected = adapted(x)
    found = whole(adapted)(x)
    assert torch.equal(found, expected) and not torch.equal(found, make_twins(kind, device=device).ours(x)[0])
    assert torch.equal(*(torch.autograd.grad(y.sum(), adapter)[0] for y in (found, expected)))


@layers
@pytest.mark.parametrize("enforce_sorted", [False, True], ids="sorted={}".format)
def test_packing_inside_what_is_compiled(kind: Kind, enforce_sorted: bool, device: str):
    """torch breaks the graph where it packs and where it pads again; the layer between is captured. Without indices
    that tell how many sequences there are, it breaks there too, and Dynamo does not go on into our operators."""
    ours = make_twins(kind, device=device, num_layers=2, bidirectional=True).ours

    def model(x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        output, hx = ours(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted))
        return pad_packed_sequence(output)[0], *tensors_of(hx)

    x = make_input(ours).requires_grad_()
    lengths = torch.tensor([4, 3, 1] if enforce_sorted else [3, 4, 1])

    def results(call: Callable) -> tuple[Tensor, ...]:
        outputs = call(x, lengths)
        total = sum(out.sum() for out in outputs)
        return *outputs, *torch.autograd.grad(total, [x, *ours.parameters()])

    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo does not know how to trace")
        found = results(torch.compile(model, backend="aot_eager"))
    assert all(map(torch.equal, found, results(model)))
    breaks = Counter(counters["graph_break"])
    at_ours = sum(count for reason, count in breaks.items() if "fused_rnn" in reason)
    assert breaks.total() - at_ours == 2
    assert (at_ours > 0) == enforce_sorted


# -------------------------------------------------------------------------------------------------- dynamic shapes


@kinds
@no_recompiles()
def test_new_lengths_do_not_recompile(kind: Kind, device: str):
    """T and B, marked as dynamic on the first call."""
    options = {} if kind.is_cell else DEEP
    ours = make_twins(kind, device=device, **options).ours
    compiled = whole(ours)
    for k, (steps, batch) in enumerate([(4, 3), (9, 2), (2, 7), (30, 16)]):
        x, hx = leaves(ours, steps, batch)
        if k == 0:
            torch._dynamo.mark_dynamic(x, 0)
            if not kind.is_cell:
                torch._dynamo.mark_dynamic(x, 1)
            for state in tensors_of(hx):
                torch._dynamo.mark_dynamic(state, 0 if kind.is_cell else 1)
        assert_same(run(ours, x, hx, call=compiled), run(ours, x, hx))


def test_a_shape_that_is_not_marked_does_recompile(device: str):
    """So that the tests above can fail."""
    ours = make_twins(GRU, device=device).ours
    compiled = whole(ours)
    compiled(make_input(ours, 4))
    with no_recompiles(), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(make_input(ours, 5))


@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
@pytest.mark.parametrize("kind", [GRU, LSTM], ids=str)
@no_recompiles()
def test_new_packed_lengths_do_not_recompile(kind: Kind, with_hx: bool, device: str):
    ours = make_twins(kind, device=device, num_layers=2, bidirectional=True).ours
    compiled = whole(ours)
    for k, lengths in enumerate([[4, 2, 3], [9, 1], [2, 2, 1, 2, 2], [*range(1, 31)]]):
        packed = pack(lengths)(torch.randn(max(lengths), len(lengths), 5, device=device))
        hx = make_state(ours, len(lengths)) if with_hx else None
        if k == 0:
            for tensor in packed:
                torch._dynamo.mark_dynamic(tensor, 0)
            for state in tensors_of(hx if with_hx else ()):
                torch._dynamo.mark_dynamic(state, 1)
        assert all(map(torch.equal, tensors_of(compiled(packed, hx)), tensors_of(ours(packed, hx))))


# ------------------------------------------------------------------------------------------------ backward alone


@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, "plain") for kind in KINDS] + [(kind, form) for kind in LAYERS for form in ("dropout", "packed")],
    ids=str,
)
def test_compiled_autograd(kind: Kind, form: str, device: str):
    """The backward pass of a call that was not compiled is captured whole as well."""
    ours = make_twins(kind, device=device, **({} if kind.is_cell else {"num_layers": 2, "dropout": 0.5})).ours
    ours.train(form == "dropout")
    x, hx = leaves(ours, 4, 3)
    how = {}
    if form == "packed":
        x = torch.randn(8, 5, device=device, requires_grad=True)
        how["form"] = lambda rows: PackedSequence(rows, torch.tensor([3, 2, 2, 1]))

    def gradients():
        torch.manual_seed(0)
        return run(ours, x, hx, **how)

    expected = gradients()
    with torch._dynamo.compiled_autograd._enable(whole):
        assert_same(gradients(), expected)
