"""The operators' mathematics in plain PyTorch: any dtype, any device, differentiable to any order.

It is the oracle of the tests, and the path of everything that the kernels do not do: complex numbers, other devices,
tangents, derivatives of rare kinds. The formulas are those of the documentation of
``torch.nn.RNN``, ``torch.nn.LSTM`` and ``torch.nn.GRU``; ``csrc/cells`` holds their fused twins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Of one direction: w_ih, w_hh, b_ih, b_hh, w_hr; a layer's weights are two of these in a row.
WEIGHTS_PER_DIRECTION = 5

State = tuple[Tensor, Tensor | None]


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def step(gates_x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None) -> State:
        return activation(gates_x + F.linear(h, w_hh, b_hh)), c

    return step


def _gru(gates_x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None) -> State:
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return n + z * (h - n), c


def _lstm(gates_x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None) -> State:
    assert c is not None
    i, f, g, o = (gates_x + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


#: One time step of each cell: (W_ih x + b_ih, h, c, w_hh, b_hh) -> (h', c'). c is None but for the LSTM.
STEPS: dict[str, Callable[..., State]] = {
    "rnn_tanh": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
    "gru": _gru,
    "lstm": _lstm,
}


def _rows_for(state: Tensor | None, initial: Tensor | None, rows: int) -> Tensor | None:
    """The state of the first ``rows`` rows; rows that were not there a step earlier start from ``initial``."""
    if state is None or initial is None or state.size(0) == rows:
        return state
    if state.size(0) > rows:
        return state[:rows]
    return torch.cat([state, initial[state.size(0) : rows]])


def _scan(
    cell: str,
    steps: Sequence[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    reverse: bool,
    kept: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """One direction over the input sides of all steps; rows of a step: longest sequence first."""
    step = STEPS[cell]
    first_rows = steps[-1 if reverse else 0].size(0)
    h, c = h0[:first_rows], None if c0 is None else c0[:first_rows]
    outputs: list[Tensor] = []
    ended: list[State] = []  # states of the sequences that ended, shortest first
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        gates_x = steps[t]
        rows = gates_x.size(0)
        if rows < h.size(0):
            ended.append((h[rows:], None if c is None else c[rows:]))
        h, c = _rows_for(h, h0, rows), _rows_for(c, c0, rows)
        if kept is not None:
            h, c = h.where(kept[t], 0), None if c is None else c.where(kept[t], 0)
        h, c = step(gates_x, h, c, w_hh, b_hh)
        if w_hr is not None:
            h = F.linear(h, w_hr)
        outputs.append(h)
    if ended:
        h = torch.cat([h, *(state[0] for state in reversed(ended))])
        if c is not None:
            c = torch.cat([c, *(state[1] for state in reversed(ended) if state[1] is not None)])
    return (outputs[::-1] if reverse else outputs), h, c


def layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *weights: Tensor | None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, one or two directions; shapes as in ``csrc/ops/library.cpp``.

    Args:
        cell: a key of :data:`STEPS`.
        input: (T, B, I), or (N, I) with ``batch_sizes``.
        h0: (D, B, Hr); None means zero.
        c0: (D, B, H); None means zero, and is all that cells other than the LSTM take.
        weights: w_ih, w_hh, b_ih, b_hh, w_hr of the first direction, then of the second (None: no such).
        reset: bool (N,), the rows of all steps; where True, the row's state is zero before that step.

    Returns:
        output (T, B, D*Hr) or (N, D*Hr), hn like h0, and cn like c0, or None but for the LSTM.
    """
    directions = [
        d for d in (weights[:WEIGHTS_PER_DIRECTION], weights[WEIGHTS_PER_DIRECTION:]) if d[0] is not None
    ]
    batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    outputs, last_h, last_c = [], [], []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(directions):
        h = input.new_zeros(batch, w_hh.size(1)) if h0 is None else h0[d]
        c = None
        if cell == "lstm":
            c = input.new_zeros(batch, w_hh.size(0) // 4) if c0 is None else c0[d]
        gates_x = F.linear(input, w_ih, b_ih)
        steps = gates_x.unbind(0) if sizes is None else gates_x.split(sizes)
        kept = None if reset is None else (~reset).unsqueeze(1).split([step.size(0) for step in steps])
        rows, h, c = _scan(cell, steps, h, c, w_hh, b_hh, w_hr, d == 1, kept)
        outputs.append(torch.stack(rows) if sizes is None else torch.cat(rows))
        last_h.append(h)
        last_c.append(c)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return output, torch.stack(last_h), torch.stack(last_c) if cell == "lstm" else None


def cell_step(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> State:
    """One time step of a batch: input (B, I), h0 and c0 (B, H) or None for zero. Returns h' and c' (LSTM) or None."""
    zeros = (input.size(0), w_hh.size(1))  # dense beside a sparse input
    h = input.new_zeros(zeros, layout=torch.strided) if h0 is None else h0
    c = input.new_zeros(zeros, layout=torch.strided) if c0 is None and cell == "lstm" else c0
    return STEPS[cell](F.linear(input, w_ih, b_ih), h, c, w_hh, b_hh)


# -------------------------------------------------------------------------------------------------- derivatives


def pull_back(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[Tensor | None],
    wanted: Sequence[bool],
    cotangents: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Gradients of a function's arguments, by operations that can be looked into."""
    chosen = [k for k, want in enumerate(wanted) if want and arguments[k] is not None]
    result: list[Tensor | None] = [None] * len(arguments)
    if not (chosen and cotangents):
        return result

    def of_chosen(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(arguments)
        for k, value in zip(chosen, values, strict=True):
            filled[k] = value
        return function(*filled)

    if torch._C._are_functorch_transforms_active():
        _, pull = torch.func.vjp(of_chosen, *(arguments[k] for k in chosen))
        found = pull(cotangents)
    else:  # as above, at half the cost, and where hooks on saved tensors are at work
        with torch.enable_grad():
            # Aliases: were one tensor passed in two places (tied weights, h0 is c0), its gradient would count twice.
            aliases = [arguments[k].view_as(arguments[k]) for k in chosen]
            outputs = of_chosen(*aliases)
        recorded = [(out, v) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
        if not recorded:
            return result
        outputs, incoming = zip(*recorded, strict=True)
        found = torch.autograd.grad(
            outputs, aliases, incoming, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
    for k, gradient in zip(chosen, found, strict=True):
        result[k] = gradient
    return result


_INPUT_IS_GONE = (
    "fused_rnn: this derivative of a backward pass needs the layer's input, which was not kept, since neither it nor "
    "weight_ih required grad. Let one of them require grad."
)


def gradients(
    cell: str, batch_sizes: Tensor | None, asked: Sequence[bool]
) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of a layer as a function of those of output, hn and cn, and of its thirteen arguments; of the
    arguments that are asked for."""

    def compute(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        incoming, arguments = tensors[:3], tensors[3:]
        if arguments[0] is None:
            raise RuntimeError(_INPUT_IS_GONE)

        def outputs(input: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
            results = layer(cell, input, batch_sizes, *others)
            return tuple(r for r, g in zip(results, incoming, strict=True) if g is not None)

        found = pull_back(outputs, arguments, asked, tuple(g for g in incoming if g is not None))
        return _filled(found, arguments, asked)

    return compute


def second_order(
    cell: str, batch_sizes: Tensor | None, asked: Sequence[bool]
) -> Callable[..., tuple[Tensor, ...]]:
    """The derivative of :func:`gradients` in a direction v, as a function of their 16 tensors and of 13 v (None: no
    change); by those of the 16 that are asked for."""

    def compute(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        first, v = tensors[:16], tensors[16:]
        changing = gradients(cell, batch_sizes, [t is not None for t in v])
        found = pull_back(changing, first, asked, tuple(t for t in v if t is not None))
        return _filled(found, first, asked)

    return compute


def _filled(
    found: Sequence[Tensor | None], like: Sequence[Tensor | None], asked: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What was asked for, zero where nothing was found."""
    return tuple(
        torch.zeros_like(t) if g is None else g for g, t, ask in zip(found, like, asked, strict=True) if ask
    )
