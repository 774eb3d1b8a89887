"""Packed weights that are kept from one call to the next, without gradients: no change of the weights is missed,
whatever trace it leaves. What is kept, and its bound: test_barrier.py. Results are compared bit by bit with those of a
layer whose equal weights lie elsewhere and were never seen."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _C

T, B, H = 40, 2, 48  # long enough to be packed


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    output, state = layer(x)
    return [output, *(state if isinstance(state, tuple) else (state,))]


def assert_as_if_new(layer: nn.Module, x: Tensor) -> None:
    for ours, new in zip(results(layer, x), results(copy.deepcopy(layer), x), strict=True):
        assert torch.equal(ours, new)


def by_another_process(layer: nn.Module) -> None:
    weight = layer.weight_hh_l0.data.share_memory_()
    layer.weight_hh_l0.data = weight
    results(layer, torch.randn(T, B, H))
    worker = torch.multiprocessing.get_context("fork").Process(target=weight.neg_)
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def into_the_memory_of_another(layer: nn.Module) -> None:
    memory = torch.empty(layer.weight_ih_l0.numel())
    for _ in range(2):
        layer.weight_ih_l0 = nn.Parameter(memory.view(-1, H))
        results(layer, torch.randn(T, B, H))
        memory.uniform_(-0.1, 0.1)


def swap_weights(layer: nn.Module) -> None:
    layer.weight_ih_l0, layer.weight_hh_l0 = layer.weight_hh_l0, layer.weight_ih_l0


def row(layer: nn.Module, i: int) -> Tensor:
    return layer.weight_hh_l0.data[i]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda layer: layer.weight_hh_l0.add_(0.1),
    "through data": lambda layer: layer.weight_ih_l0.data.mul_(2),
    "through numpy": lambda layer: layer.weight_hh_l0.data.numpy().fill(0.03),
    "one number of the last unit": lambda layer: row(layer, -1)[-1:].add_(0.5),
    "two signs": lambda layer: row(layer, 3)[::16].neg_(),
    "two rows": lambda layer: layer.weight_hh_l0.data.copy_(layer.weight_hh_l0.data.roll(1, 0)),
    "two columns": lambda layer: layer.weight_hh_l0.data.copy_(layer.weight_hh_l0.data.roll(16, 1)),
    "another tensor": lambda layer: setattr(layer.weight_hh_l0, "data", torch.randn_like(layer.weight_hh_l0)),
    "another parameter": lambda layer: setattr(
        layer, "weight_ih_l0", nn.Parameter(torch.randn(layer.weight_ih_l0.shape))
    ),
    "swapped": swap_weights,
    "tied": lambda layer: setattr(layer, "weight_ih_l0", layer.weight_hh_l0),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v / 2 for k, v in layer.state_dict().items()}),
    "by another process": by_another_process,
    "into the memory of another": into_the_memory_of_another,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("isa", _C.isas())
def test_no_change_of_the_weights_is_missed(isa: str, change: str) -> None:
    _C.set_isa(isa)
    for cell in (fused_rnn.LSTM, fused_rnn.GRU):
        layer, x = cell(H, H), torch.randn(T, B, H)
        name = cell.__name__.lower()
        assert _C.cpu_plan(name, T=T, B=B, I=H, H=H, threads=1)["strategy"] == "packed"
        with torch.no_grad():
            before = results(layer, x)
            assert_as_if_new(layer, x)
            CHANGES[change](layer)
            assert not torch.equal(results(layer, x)[0], before[0])
            assert_as_if_new(layer, x)


def test_of_inference_tensors_which_count_no_versions() -> None:
    with torch.inference_mode():
        layer, x = fused_rnn.LSTM(H, H), torch.randn(T, B, H)
        before = results(layer, x)
        layer.weight_hh_l0.mul_(1.5)
        assert not torch.equal(results(layer, x)[0], before[0])
        assert_as_if_new(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_layers_of_all_kinds_one_after_another(dtype: torch.dtype) -> None:
    """The same memory again as a matrix of another shape, direction or number; projections; training in between."""
    memory = torch.empty(4 * 96 * 96, dtype=dtype).uniform_(-0.1, 0.1)
    for hidden, proj, directions in [
        (96, 0, 1),
        (48, 0, 2),
        (96, 40, 1),
        (64, 24, 2),
        (48, 0, 1),
        (96, 0, 1),
    ]:
        layer = fused_rnn.LSTM(H, hidden, proj_size=proj, bidirectional=directions == 2, dtype=dtype)
        for weight in layer.parameters():
            weight.data = memory[: weight.numel()].view(weight.shape)
        x = torch.randn(T, B, H, dtype=dtype)
        assert_as_if_new(layer, x)
        assert_as_if_new(layer, x)
        with torch.enable_grad():
            layer(x)[0].sum().backward()
        memory.mul_(1.01)
        assert_as_if_new(layer, x)


@torch.no_grad()
def test_threads_that_share_a_layer() -> None:
    layer, x = fused_rnn.LSTM(H, H), torch.randn(T, B, H)
    wanted, found = results(layer, x)[0], []

    def work() -> None:
        with torch.no_grad():
            found.extend(torch.equal(results(layer, x)[0], wanted) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200
