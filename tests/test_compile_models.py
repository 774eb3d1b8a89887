"""Whole models compiled: with dropout, autocast and other weights, by inductor, and trained.

A graph costs inductor seconds where there is pointwise work, so it gets a few cases of each kind;
tests/test_compile.py has the breadth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from compiling import assert_compiles, assert_same, no_recompiles, whole
from parity import (
    CLASSES,
    GRU,
    GRU_CELL,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    RNN,
    Kind,
    leaves,
    make_input,
    make_twins,
    pack,
    run,
    tensors_of,
)
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache

import fused_rnn
from fused_rnn import ops

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own remark, about itself

classes = pytest.mark.parametrize("kind", CLASSES, ids=str)
backends = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])

DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.fixture(autouse=True, scope="module")
def _compiled_now() -> Iterator[None]:
    """Not some other day, for torch keeps on disk what it compiled."""
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize(
    "kind, inside",
    [(LSTM, True), (LSTM, False), (LSTM_PROJ, False), (GRU, False), (RNN, False), (LSTM_CELL, True)],
    ids=str,
)
def test_autocast(kind: Kind, inside: bool, device: str):
    ours = make_twins(kind, device=device).ours
    x, hx = leaves(ours, 4, 3)

    def cast(*args):
        with torch.autocast(device, torch.bfloat16):
            return ours(*args)

    compiled = whole(cast if inside else ours)
    if inside:
        found = run(ours, x, hx, call=compiled)
    else:
        with torch.autocast(device, torch.bfloat16):
            found = run(ours, x, hx, call=compiled)
    assert_same(found, run(ours, x, hx, call=cast))


@backends
@inductor_config.patch(fallback_random=True)
def test_dropout(backend: str, device: str):
    """The same seed drops the same outputs, once inductor is told to use torch's own generator."""
    ours = make_twins(LSTM, device=device, num_layers=3, dropout=0.5).ours
    x = make_input(ours).requires_grad_()
    compiled = whole(ours, backend)
    torch.manual_seed(1)
    found = run(ours, x, call=compiled)
    torch.manual_seed(1)
    expected = run(ours, x)
    assert_same(found, expected, backend)
    ours.eval()
    assert not torch.equal(run(ours, x)["output"], expected["output"])
    assert_same(run(ours, x, call=compiled), run(ours, x), backend)


def test_inference_mode(device: str):
    ours = make_twins(LSTM, device=device).ours
    x = make_input(ours)
    with torch.inference_mode():
        found, expected = whole(ours)(x), ours(x)
    assert all(map(torch.equal, tensors_of(found), tensors_of(expected)))


@pytest.mark.parametrize("kind", [GRU, LSTM_CELL], ids=str)
def test_other_weights_by_functional_call(kind: Kind, device: str):
    ours = make_twins(kind, device=device).ours
    x = make_input(ours)
    weights = {name: torch.randn_like(weight) for name, weight in ours.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return tensors_of(torch.func.functional_call(ours, weights, (x,)))[0].pow(2).sum()

    assert torch.equal(whole(loss)(weights, x), loss(weights, x))
    found, expected = whole(torch.func.grad(loss))(weights, x), torch.func.grad(loss)(weights, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("kind", [GRU, LSTM, LSTM_CELL], ids=str)
def test_functional_call_with_weights_of_another_dtype(kind: Kind, device: str):
    """In a graph the module's own weights say nothing of the dtype, nor do those that it was lent outside of one."""
    ours = make_twins(kind, device=device).ours
    x = make_input(ours)
    weights = {name: weight.detach().double() for name, weight in ours.named_parameters()}

    def call(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        return tensors_of(torch.func.functional_call(ours, weights, (x,)))

    found = whole(call)(weights, x.double())
    assert all(map(torch.equal, found, call(weights, x.double())))
    torch._dynamo.reset()
    found = tensors_of(whole(ours)(x))
    assert all(map(torch.equal, found, tensors_of(ours(x))))
    if not kind.is_cell:
        with pytest.raises(ValueError, match=r"input dtype \(torch.float32\) does not match weight dtype"):
            call(weights, x)


def test_parametrized_weights(device: str):
    ours = make_twins(GRU, device=device, dtype=torch.float64).ours
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    x = make_input(ours)
    expected = run(ours, x)
    for name, value in run(ours, x, call=whole(ours)).items():
        torch.testing.assert_close(value, expected[name])


def test_checkpointing(device: str):
    ours = make_twins(LSTM, device=device).ours
    x = make_input(ours).requires_grad_()

    def checkpointed(x: Tensor):
        return torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)

    assert_same(run(ours, x, call=whole(checkpointed)), run(ours, x))


def test_convert_after_compile_and_deepcopy(device: str):
    """A compiled model is converted, copied and trained: the copy is on its own."""
    model = nn.GRU(5, 7, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    fused_rnn.convert(compiled)
    x = torch.randn(4, 3, 5, device=device)
    expected = compiled(x)[0]
    twin = copy.deepcopy(compiled)
    assert isinstance(twin._orig_mod, fused_rnn.GRU) and twin._orig_mod is not model
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(compiled(x)[0], expected)
    assert torch.equal(twin(x)[0], torch.zeros_like(expected))


# ---------------------------------------------------------------------------------------------------- inductor


@classes
def test_inductor(kind: Kind, device: str):
    ours = make_twins(kind, device=device).ours
    assert_compiles(ours, *leaves(ours, 4, 3), backend="inductor")


def test_inductor_on_what_is_not_contiguous(device: str):
    """batch_first transposes, one weight is a slice, and the gradient that comes back is an expanded scalar."""
    ours = make_twins(LSTM, device=device, **DEEP).ours
    ours.weight_hh_l0 = nn.Parameter(torch.randn(14, 28, device=device).t()[:, ::2])
    x, hx = leaves(ours, 4, 3)
    assert_compiles(ours, x, hx, backend="inductor")
    inputs = [x, *hx, *ours.parameters()]
    expected = torch.autograd.grad(ours(x, hx)[0].sum(), inputs)
    found = torch.autograd.grad(whole(ours, "inductor")(x, hx)[0].sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_inductor_on_packed_sequences(device: str):
    ours = make_twins(LSTM_PROJ, device=device, num_layers=2, bidirectional=True).ours
    assert_compiles(ours, *leaves(ours, 4, 3), form=pack([2, 4, 3]), backend="inductor")


@no_recompiles()
def test_inductor_with_new_lengths(device: str):
    ours = make_twins(GRU, device=device, **DEEP).ours
    compiled = whole(ours, "inductor")
    for k, (steps, batch) in enumerate([(4, 3), (9, 2), (2, 7)]):
        x, _ = leaves(ours, steps, batch, with_hx=False)
        if k == 0:
            torch._dynamo.mark_dynamic(x, (0, 1))
        assert_same(run(ours, x, call=compiled), run(ours, x), "inductor")


def test_pointwise_work_around_a_layer_fuses(device: str):
    """Before the layer and behind it there is one kernel each, as if the layer were any operator of torch's."""
    ours = make_twins(GRU, device=device).ours

    def model(x: Tensor) -> Tensor:
        return torch.sigmoid(ours(torch.relu(x) * 2 + 1)[0]).mul(3).sub(1).tanh()

    x = make_input(ours)
    compiled = whole(model, "inductor")
    with torch.no_grad():
        metrics.reset()
        found = compiled(x)
        assert metrics.generated_kernel_count == 2
        torch.testing.assert_close(found, model(x))


def test_code_kept_on_disk_is_of_this_build(device: str, monkeypatch):
    """torch finds it by the text of the graph, where our operator says which build wrote it."""
    ours = make_twins(GRU, device=device).ours
    x, found = make_input(ours), torch._dynamo.utils.counters["aot_autograd"]

    def compiled_anew() -> bool:
        torch._dynamo.reset()
        found.clear()
        whole(ours, "inductor")(x)[0].sum().backward()
        return found["autograd_cache_hit"] == 0

    assert compiled_anew() and not compiled_anew()
    monkeypatch.setattr(ops, "BUILD", "another")
    assert compiled_anew() and not compiled_anew()


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
def test_transforms_inside(transform: str, device: str):
    ours = make_twins(GRU, device=device, dtype=torch.float64).ours

    def loss(x: Tensor) -> Tensor:
        return ours(x)[0].pow(2).sum()

    function = torch.vmap(loss if transform == "vmap" else torch.func.grad(loss))
    x = torch.randn(6, 4, 3, 5, dtype=torch.float64, device=device)
    torch.testing.assert_close(whole(function)(x), function(x))


class Tagger(nn.Module):
    """Embedding, recurrent layers, linear, and the loss."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = layer(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 5)

    def forward(self, words: Tensor, tags: Tensor) -> Tensor:
        hidden, _ = self.layers(self.embed(words))
        return nn.functional.cross_entropy(self.head(torch.relu(hidden)).flatten(0, 1), tags.flatten())


@backends
def test_training_a_whole_model(backend: str, device: str):
    """Model and loss are one graph. The optimizer's step is compiled too; around it torch breaks the graph itself."""
    torch.manual_seed(0)
    eager = Tagger(fused_rnn.LSTM).to(device)
    model = copy.deepcopy(eager)
    words, tags = torch.randint(11, (4, 6), device=device), torch.randint(5, (4, 6), device=device)

    def losses(loss_of: Callable, model: nn.Module, compiled: bool) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        found = []
        for _ in range(5):
            loss = loss_of(words, tags)
            loss.backward()
            step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses(eager, eager, compiled=False)
    assert expected[-1] < expected[0]
    found = losses(whole(model, backend), model, compiled=True)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_training_step_in_one_graph(device: str):
    """Loss, gradients by torch.func and the update of the weights."""
    torch.manual_seed(0)
    model = Tagger(fused_rnn.GRU).to(device)
    words, tags = torch.randint(11, (4, 6), device=device), torch.randint(5, (4, 6), device=device)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def step(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, weights, (words, tags))

        gradients, value = torch.func.grad_and_value(loss)(weights)
        return {name: weight - 0.5 * gradients[name] for name, weight in weights.items()}, value

    compiled, expected, found = whole(step), start, start
    for _ in range(3):
        expected, loss = step(expected)
        found, compiled_loss = compiled(found)
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [LSTM, GRU_CELL], ids=str)
def test_reduce_overhead(kind: Kind):
    """mode="reduce-overhead": CUDA graphs of forward and backward."""
    ours = make_twins(kind, device="cuda").ours
    compiled = torch.compile(ours, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        x, hx = leaves(ours, 4, 3)
        expected = run(ours, x, hx)
        for name, value in run(ours, x, hx, call=compiled).items():
            torch.testing.assert_close(value, expected[name])
