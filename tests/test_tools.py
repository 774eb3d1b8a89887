"""Tools of torch's that look at a model or carry it about: FLOP counter, profiler; copies, pickles, processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from parity import (
    CLASSES,
    GRU,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    Kind,
    leaves,
    make_input,
    make_state,
    make_twins,
    pack,
    tensors_of,
    weights_like,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from fused_rnn import functional, ops

# torch's own remark, about itself
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- FLOPs


def flops(
    module: nn.Module, x: Tensor, hx, *, backward: bool, form: Callable = lambda x: x
) -> dict[str, int]:
    """By operator, of the forward pass or of both; `form` turns x into what the module is called with."""
    with FlopCounterMode(display=False) as counter:
        outputs = tensors_of(module(form(x), hx))
        if backward:
            sum(out.sum() for out in outputs).backward()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


@pytest.fixture
def in_plain_pytorch(monkeypatch):
    """Calls the reference in the place of the kernels, so that torch counts its products."""

    def switch() -> None:
        monkeypatch.setattr(functional, "_path", lambda tensors: functional._REFERENCE)
        for short_way in ("cell_at_once", "layer_at_once"):
            monkeypatch.setattr(ops, short_way, lambda *_: None)

    return switch


def assert_flops_are_the_references(module: nn.Module, x: Tensor, hx, switch, **how) -> None:
    ours = {backward: flops(module, x, hx, backward=backward, **how) for backward in (False, True)}
    switch()
    for backward, found in ours.items():
        theirs = flops(module, x, hx, backward=backward, **how)
        assert not [name for name in theirs if name.startswith("fused_rnn")]
        assert sum(found.values()) == sum(theirs.values()) > 0
        assert all(name.startswith("fused_rnn") for name in found), (
            "a product outside the kernels is not counted twice"
        )


@kinds
@pytest.mark.parametrize("with_hx", [True, False], ids="hx={}".format)
@pytest.mark.parametrize("bias", [True, False], ids="bias={}".format)
def test_flops(kind: Kind, with_hx: bool, bias: bool, device: str, in_plain_pytorch):
    """Exactly those of the matrix products that the same call makes in plain PyTorch, forward and backward."""
    options = {} if kind.is_cell else {"num_layers": 2, "bidirectional": True}
    ours = make_twins(kind, device=device, bias=bias, **options).ours
    assert_flops_are_the_references(ours, *leaves(ours, 4, 3, with_hx=with_hx), in_plain_pytorch)


@layers
def test_flops_of_packed_input(kind: Kind, device: str, in_plain_pytorch):
    ours = make_twins(kind, device=device, bidirectional=True).ours
    x, hx = leaves(ours, 4, 3)
    assert_flops_are_the_references(ours, x, hx, in_plain_pytorch, form=pack([2, 4, 3]))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0_reverse", "weight_hr_l0", "x", "hx"])
def test_flops_of_what_is_wanted(frozen: str, device: str, in_plain_pytorch):
    """No gradient, no product for it."""
    ours = make_twins(LSTM_PROJ, device=device, bidirectional=True).ours
    x, hx = leaves(ours, 4, 3)
    named = {"x": [x], "hx": list(hx)} | {name: [weight] for name, weight in ours.named_parameters()}
    for tensor in named[frozen]:
        tensor.requires_grad_(False)
    assert_flops_are_the_references(ours, x, hx, in_plain_pytorch)


def test_flops_by_the_formula(device: str):
    """2 for each weight and row, forward; that and as much again for weights and for inputs, backward."""
    ours = make_twins(LSTM, device=device).ours
    x, hx = leaves(ours, 4, 3)
    once = 2 * (4 * 3) * (28 * 5 + 28 * 7)
    found = flops(ours, x, hx, backward=True)
    assert found == {"fused_rnn.layer_forward": once, "fused_rnn.layer_backward": 2 * once}


def penalty_flops(module: nn.Module, x: Tensor, hx) -> dict[str, int]:
    """Of the gradients of a gradient penalty, the first derivative within."""
    wanted = [t for t in (x, *tensors_of(hx), *module.parameters()) if t.requires_grad]
    loss = sum((out * weights_like(out)).sum() for out in tensors_of(module(x, hx)))
    with FlopCounterMode(display=False) as counter:
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


@kinds
@pytest.mark.parametrize("frozen", [None, "x", "weight_ih", "weight_hh", "weight_hr"])
def test_flops_of_a_double_backward(kind: Kind, frozen: str | None, in_plain_pytorch):
    """Those of plain PyTorch, which differentiates the backward pass as a graph; of that, ours keeps no gradient of
    what was projected."""
    ours = make_twins(kind, **({} if kind.is_cell else {"bidirectional": True})).ours
    x, hx = leaves(ours, 4, 3)
    named = dict(ours.named_parameters())
    for name, tensor in {**named, "x": x}.items():
        tensor.requires_grad_(frozen is None or frozen not in name)
    found = penalty_flops(ours, x, hx)
    assert all(name.startswith("fused_rnn") for name in found)
    in_plain_pytorch()
    theirs = penalty_flops(ours, x, hx)
    assert not any(name.startswith("fused_rnn") for name in theirs)
    steps, batch = (1 if kind.is_cell else 4), 3
    again = 2 * steps * batch * sum(w.numel() for n, w in named.items() if "_hr_" in n)
    # Plain PyTorch leaves out the products by which the projection's last output changes: no step comes after it.
    again += sum(
        2 * batch * w.numel() * (4 if w.requires_grad else 2) for n, w in named.items() if "_hr_" in n
    )
    assert sum(found.values()) == sum(theirs.values()) + again


@layers
def test_a_penalty_takes_about_three_training_steps(kind: Kind):
    """In FLOPs: a training step that adds to its loss the squares of all of its gradients."""
    ours = make_twins(kind, 16, 16).ours
    x, _ = leaves(ours, 9, 3, with_hx=False)
    plain = sum(flops(ours, x, None, backward=True).values())
    with FlopCounterMode(display=False) as counter:
        loss = sum(out.pow(2).sum() for out in tensors_of(ours.forward(x)))
        first = torch.autograd.grad(loss, [x, *ours.parameters()], create_graph=True)
        torch.autograd.grad(loss + sum(g.pow(2).sum() for g in first), [x, *ours.parameters()])
    assert (
        2.5 * plain < counter.get_total_flops() < 3.02 * plain
    )  # a projection takes a little more than three


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind is not LSTM_PROJ], ids=str)
def test_flops_of_gradients_of_each_sample(kind: Kind, device: str):
    """As many as those of their sum. (With a projection they are computed in plain PyTorch, and cost more.)"""
    ours = make_twins(kind, device=device).ours
    x, hx = leaves(ours, 4, 3)
    x.requires_grad_(False)
    summed = sum(flops(ours, x, hx, backward=True).values())
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}
    states = tuple(h.detach() for h in tensors_of(hx))

    def loss(weights: dict[str, Tensor], states: tuple[Tensor, ...], x: Tensor) -> Tensor:
        hx = tuple(h.unsqueeze(1) for h in states)
        outputs = torch.func.functional_call(ours, weights, (x.unsqueeze(1), hx if kind.is_lstm else hx[0]))
        return sum(out.sum() for out in tensors_of(outputs))

    with FlopCounterMode(display=False) as counter:
        torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, 1, 1))(weights, states, x)
    assert "fused_rnn.layer_gate_gradients" in {str(name) for name in counter.get_flop_counts()["Global"]}
    assert counter.get_total_flops() == summed


# -------------------------------------------------------------------------------------------- profiler and timer


@classes
def test_profiler(kind: Kind, device: str):
    """One event a call, by the operator's name and with the shapes of its arguments."""
    ours = make_twins(kind, device=device).ours
    x = make_input(ours)
    name = "cell" if kind.is_cell else "layer"
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(3):
            tensors_of(ours(x))[0].sum().backward()
    events = {event.key: event for event in profiled.key_averages(group_by_input_shape=True)}
    for operator in (f"fused_rnn::{name}_forward", f"fused_rnn::{name}_backward"):
        assert events[operator].count == 3
        assert list(x.shape) in events[operator].input_shapes


def test_timer(device: str):
    ours = make_twins(GRU, device=device).ours
    timer = Timer("ours(x)", globals={"ours": ours, "x": make_input(ours)}, label="GRU")
    assert timer.timeit(3).median > 0


# ---------------------------------------------------------------------------------------------- copies and pickles


def first(module: nn.Module, x: Tensor) -> Tensor:
    return tensors_of(module(x))[0]


@classes
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_compiled_module(kind: Kind, way: str, device: str):
    """They compile for themselves, hold weights of their own, and train."""
    ours = make_twins(kind, device=device).ours
    compiled, x = torch.compile(ours, backend="aot_eager", fullgraph=True), make_input(ours)
    expected = first(compiled, x)
    twin = copy.deepcopy(compiled) if way == "deepcopy" else pickle.loads(pickle.dumps(compiled))
    assert torch.equal(first(twin, x), expected)
    first(twin, x).sum().backward()
    assert all(weight.grad is not None for weight in twin.parameters() if weight.requires_grad)
    assert all(weight.grad is None for weight in ours.parameters())
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(first(compiled, x), expected)
    assert torch.equal(first(twin, x), torch.zeros_like(expected))


def test_compiling_inside_a_copied_model(device: str):
    """model.compile() compiles in place, and copies carry on without."""
    ours = make_twins(LSTM, device=device).ours
    x = make_input(ours)
    expected = first(ours, x)
    ours.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(first(ours, x), expected)
    assert torch.equal(first(copy.deepcopy(ours), x), expected)


# ----------------------------------------------------------------------------------------------------- processes


class Features(Dataset):
    """Each item is computed by a recurrent layer, in the worker."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.layer(torch.full((3, 5), float(index)))[0]


@pytest.mark.slow
def test_spawned_workers_of_a_data_loader():
    """The layer is pickled, and the extension loaded anew in each process."""
    features = Features(make_twins(LSTM, num_layers=2, bidirectional=True).ours)
    loader = DataLoader(features, batch_size=2, num_workers=2, multiprocessing_context="spawn")
    found = torch.cat(list(loader))
    torch.testing.assert_close(found, torch.stack([features[index] for index in range(len(features))]))


def _train_in_another_process(module: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        first(module, x).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GRU, LSTM_CELL], ids=str)
def test_weights_in_shared_memory(kind: Kind):
    """What another process does to them is seen here: it trains, and the outputs here are those of training here."""
    ours = make_twins(kind).ours
    x, alone = make_input(ours), copy.deepcopy(ours)
    ours.share_memory()
    assert all(weight.is_shared() for weight in ours.parameters())
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_train_in_another_process, args=(ours, x)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    _train_in_another_process(alone, x)
    torch.testing.assert_close(first(ours, x), first(alone, x))
    assert not torch.equal(first(ours, x), first(make_twins(kind).ours, x))


@kinds
def test_states_in_shared_memory(kind: Kind):
    """share_memory_() on what goes in."""
    ours = make_twins(kind).ours
    x, hx = make_input(ours), make_state(ours)
    expected = tensors_of(ours(x, hx))
    for tensor in (x, *tensors_of(hx)):
        tensor.share_memory_()
    assert all(map(torch.equal, tensors_of(ours(x, hx)), expected))
