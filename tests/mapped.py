"""What the tests of torch.func share: modules as functions, samples to map over, a loop in place of vmap."""

from __future__ import annotations

import torch
from parity import make_input, make_state, make_twins, tensors_of, weights_like
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

SAMPLES = 3
DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def make(kind, *, dtype=torch.float64, **options) -> nn.Module:
    return make_twins(kind, 4, 5, dtype=dtype, **options).ours


def make_samples(module: nn.Module) -> tuple[Tensor, ...]:
    """Inputs and states of several calls, stacked."""
    calls = [(make_input(module), *tensors_of(make_state(module))) for _ in range(SAMPLES)]
    return tuple(torch.stack(tensors) for tensors in zip(*calls, strict=True))


def call(module: nn.Module, weights: dict[str, Tensor], x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    hx = states if len(states) != 1 else states[0]
    return tuple(tensors_of(functional_call(module, weights, (x, hx) if states else (x,))))


def loss(module: nn.Module, weights: dict[str, Tensor], x: Tensor, *states: Tensor) -> Tensor:
    return sum((out * weights_like(out)).pow(2).sum() for out in call(module, weights, x, *states))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def looped(function, in_dims: tuple[int | None, ...], *tensors):
    """What vmap stands for."""
    found = []
    for k in range(SAMPLES):
        one = [t if dim is None else tree_map(lambda t, k=k: t[k], t)
               for t, dim in zip(tensors, in_dims, strict=True)]  # fmt: skip
        found.append(function(*one))
    return tree_map(lambda *parts: torch.stack(parts), *found)


def assert_close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Count(TorchDispatchMode):
    """Operators called, below every transform."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def of(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name in self.names)


def count(function, *args) -> Count:
    with Count() as counter:
        function(*args)
    return counter
