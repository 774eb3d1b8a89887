"""The numbers of one case: weights, input and upstream gradient, the same for every contender.

Also the one place that says what "running the case" means for a module of torch.nn's interface.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .case import Case
from .precision import TORCH_DTYPES

CLASS_NAMES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "rnn_relu": "RNN",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "rnn_cell": "RNNCell",
}

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One case with its numbers. Sequences are time-major.

    `x` is [T, B, I], or [frames, I] with `batch_sizes` [T] when the case is packed. `state` is empty for the
    layers (their hx is left out, as most models do) and (h,) or (h, c) of [B, H] for the cells. `cotangent`
    is the gradient that arrives at `output` ([T, B, D*H] or [frames, D*H]), or at h ([B, H]) for the cells.
    """

    case: Case
    weights: dict[str, Tensor]
    x: Tensor
    batch_sizes: Tensor | None
    state: tuple[Tensor, ...]
    cotangent: Tensor

    @property
    def training(self) -> bool:
        return self.case.training

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; exact when it is a wider one."""
        return replace(
            self,
            weights={name: value.to(dtype) for name, value in self.weights.items()},
            x=self.x.to(dtype),
            state=tuple(value.to(dtype) for value in self.state),
            cotangent=self.cotangent.to(dtype),
        )


def make_problem(case: Case, draw: int = 0) -> Problem:
    """Draw the numbers of a case from a seed made of its shape: the same every time, on every device. Other
    draws give other numbers.

    They are drawn in float32 and rounded to the case's dtype, so that the float64 reference sees exactly
    what the contenders see.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{case.cell} {case.shape}".encode()) + draw)
        module = build_module(nn, case, torch.float32, "cpu")
        if case.cell == "rnn_relu":
            _keep_sums_from_zero(module)
        x = torch.randn(case.T, case.B, case.I)
        width = case.directions * case.H
        if case.is_layer:
            state: tuple[Tensor, ...] = ()
            cotangent = torch.randn(case.T, case.B, width)
        else:
            state = tuple(torch.randn(case.B, case.H) for _ in range(2 if case.has_cell_state else 1))
            cotangent = torch.randn(case.B, case.H)
    batch_sizes = None
    if case.lengths != "dense":
        lengths = torch.tensor(case.sequence_lengths())
        x, batch_sizes, _, _ = pack_padded_sequence(x, lengths)
        cotangent = pack_padded_sequence(cotangent, lengths).data
    dtype = TORCH_DTYPES[case.dtype]

    def place(value: Tensor) -> Tensor:
        return value.detach().to(device=case.device, dtype=dtype)

    weights = {name: place(value) for name, value in module.state_dict().items()}
    return Problem(case, weights, place(x), batch_sizes, tuple(map(place, state)), place(cotangent))


@torch.no_grad()
def _keep_sums_from_zero(module: nn.Module) -> None:
    """ReLU's slope jumps at zero: a sum that rounding brings to its other side has another gradient, in every library.
    So half of the units are always on, the others always off."""
    for name, parameter in module.named_parameters():
        parameter.mul_(0.1)
        if name.startswith("bias_ih"):
            parameter.copy_(torch.arange(len(parameter)) % 2 * 2.0 - 1)


def build_module(namespace: ModuleType, case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The module of this case from `torch.nn`, `fused_rnn` or whatever else has their interface."""
    kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
    if case.is_layer:
        kwargs |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    if case.cell == "rnn_relu":
        kwargs["nonlinearity"] = "relu"
    return getattr(namespace, CLASS_NAMES[case.cell])(case.I, case.H, **kwargs)


@dataclass(frozen=True)
class Prepared:
    """A call ready to be timed, the function that names what it returned, and the tensors it was given."""

    call: Callable[[], Any]
    collect: Callable[[Any], Outputs]
    leaves: tuple[Tensor, ...] = ()


def module_call(module: nn.Module, problem: Problem) -> Prepared:
    """The case as a call of a module with torch.nn's interface.

    Inference is the forward call. A training step is forward and backward: gradients of every parameter, of
    the input, and of the state where one is given. With a penalty the squares of these are added to the loss.
    """
    module.load_state_dict(problem.weights)
    module.train(problem.training)
    return _layer_call(module, problem) if problem.case.is_layer else _cell_call(module, problem)


def _penalized(output: Tensor, wanted: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    first = torch.autograd.grad(output, wanted, cotangent, create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
    return torch.autograd.grad((output, penalty), wanted, (cotangent, None))


_GRADIENTS = {"train": torch.autograd.grad, "penalty": _penalized}


def _leaf(value: Tensor, problem: Problem) -> Tensor:
    return value.detach().clone().requires_grad_(problem.training)


def _layer_call(module: nn.Module, problem: Problem) -> Prepared:
    leaf = _leaf(problem.x, problem)
    packed = problem.batch_sizes is not None
    x = PackedSequence(leaf, problem.batch_sizes) if packed else leaf
    names, parameters = zip(*module.named_parameters(), strict=True)
    wanted = (leaf, *parameters)
    cotangent = problem.cotangent
    gradients = _GRADIENTS.get(problem.case.mode)

    def infer() -> Any:
        return module(x), ()

    def train() -> Any:
        result = module(x)
        output = result[0].data if packed else result[0]
        return result, gradients(output, wanted, cotangent)

    def collect(returned: Any) -> Outputs:
        (output, state), gradients = returned
        named = {"output": output.data if packed else output}
        named |= _name_state(state)
        return named | {
            f"grad {name}": value for name, value in zip(("input", *names), gradients, strict=False)
        }

    return Prepared(train if problem.training else infer, collect, wanted)


def _cell_call(module: nn.Module, problem: Problem) -> Prepared:
    # Every step's input is a leaf of its own, so that the loop measures the cell and not slicing.
    steps = [_leaf(step, problem) for step in problem.x.unbind(0)]
    states = tuple(_leaf(value, problem) for value in problem.state)
    names, parameters = zip(*module.named_parameters(), strict=True)
    wanted = (*steps, *states, *parameters)
    cotangent = problem.cotangent
    gradients = _GRADIENTS.get(problem.case.mode)
    is_pair = problem.case.has_cell_state
    start = states if is_pair else states[0]

    def infer() -> Any:
        state = start
        for step in steps:
            state = module(step, state)
        return state, ()

    def train() -> Any:
        state = start
        for step in steps:
            state = module(step, state)
        return state, gradients(state[0] if is_pair else state, wanted, cotangent)

    def collect(returned: Any) -> Outputs:
        state, gradients = returned
        named = _name_state(state)
        if gradients:
            named["grad input"] = torch.stack(gradients[: len(steps)])
            rest = (*("h_0", "c_0")[: len(states)], *names)
            named |= {
                f"grad {name}": value for name, value in zip(rest, gradients[len(steps) :], strict=True)
            }
        return named

    return Prepared(train if problem.training else infer, collect, wanted)


def _name_state(state: Any) -> Outputs:
    return {"h_n": state[0], "c_n": state[1]} if isinstance(state, tuple) else {"h_n": state}
