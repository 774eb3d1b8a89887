"""A layer for the persistent CUDA kernels (csrc/cuda/persistent.h), called one by one on the emulated device, and the
same in float64 with autograd."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from emulation.device import Buffer, Emulated
from torch import Tensor

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # in the order of CellKind
# What kernels store, by the names of the planner, and the rounding of what is stored or multiplied.
NUMBERS = {
    "bf16": (torch.bfloat16, 2.0**-7),
    "fp16": (torch.float16, 2.0**-10),
    "tf32": (torch.float32, 2.0**-10),
    "fp32": (torch.float32, 2.0**-23),
}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}
GATE_GRADS = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}
FORWARD, BACKWARD = 0, 1


class Tile(ctypes.Structure):
    _fields_ = [("k_groups", ctypes.c_int), ("columns", ctypes.c_int), ("exchange", ctypes.c_int)]


def tile(exchange: str, k_groups: int, columns: int = 1) -> Tile:
    return Tile(k_groups, columns, ("block", "cluster", "grid").index(exchange))


def attach(machine: Emulated) -> Emulated:
    """Tells ctypes the functions of emulation/persistent.cu."""
    int_, long = ctypes.c_int, ctypes.c_int64
    library = machine.library
    library.run_persistent.restype = ctypes.c_char_p
    library.persistent_exchange_bytes.restype = long
    library.persistent_exchange_bytes.argtypes = [int_, int_, int_, ctypes.POINTER(Tile), long, long, long]
    return machine


@dataclass
class Layer:
    machine: Emulated
    cell: str
    numbers: str
    T: int
    B: int
    H: int
    D: int = 1
    packed: bool = False
    reset: bool = False
    states: bool = True
    bias: bool = True
    seed: int = 0
    keep: list[Buffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.dtype, self.rounding = NUMBERS[self.numbers]
        G, H, D, dtype = GATES[self.cell], self.H, self.D, self.dtype
        lengths = torch.randint(1, self.T + 1, (self.B,)) if self.packed else torch.full((self.B,), self.T)
        lengths[0] = self.T
        self.sizes = [int((lengths > t).sum()) for t in range(self.T)]
        self.offsets = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
        self.N = self.offsets[-1]
        self.gates_x = torch.randn(D, self.N, G * H) / 2
        self.w_hh = (torch.randn(D, G * H, H) / H**0.5).to(dtype)
        if self.cell == "rnn_relu":  # signs that no rounding changes
            self.w_hh /= 10
            self.gates_x += 2 * self.gates_x.sign()
        self.b_ih, self.b_hh = (
            (torch.randn(D, G * H) / 5).to(dtype) if self.bias else None for _ in range(2)
        )
        self.h0 = (torch.randn(D, self.B, H) / 2).to(dtype) if self.states else None
        self.c0 = (torch.randn(D, self.B, H) / 2).to(dtype) if self.states and self.cell == "lstm" else None
        self.mask = torch.rand(self.N) < 0.3 if self.reset else None
        self.grad_output = torch.randn(self.N, D * H).to(dtype)
        self.grad_hn, self.grad_cn = (torch.randn(D, self.B, H).to(dtype) for _ in range(2))

    # ------------------------------------------------------------------------------------------ on the device

    def upload(self, tensor: Tensor | None) -> Buffer | None:
        return None if tensor is None else self.machine.upload(tensor)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Buffer:
        return self.machine.upload(torch.full(shape, float("nan"), dtype=dtype or self.dtype))

    def at(self, buffer: Buffer | None, numbers: int = 0) -> int:
        """The address so many numbers behind the first."""
        if buffer is None:
            return 0
        self.keep.append(buffer)
        return buffer.address + numbers * buffer.like.element_size()

    def run(self, direction: int, tile: Tile, words: list[int]) -> None:
        """`words`: the struct of arguments, all of whose members have 8 bytes."""
        arguments = (ctypes.c_int64 * len(words))(*words)
        error = self.machine.library.run_persistent(
            direction, [*NUMBERS].index(self.numbers), CELLS.index(self.cell), ctypes.byref(tile), arguments
        )
        if error:
            raise RuntimeError(error.decode())

    def exchange(self, direction: int, tile: Tile) -> int:
        size = torch.finfo(self.dtype).bits // 8
        count = self.machine.library.persistent_exchange_bytes(
            direction, GATES[self.cell], size, tile, self.B, self.H, self.D
        )
        return self.at(self.upload(torch.full((max(count, 8),), 77, dtype=torch.uint8)))

    def forward(self, tile: Tile, cuts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """output, hn, cn; in launches that end at the steps `cuts` and at the last."""
        T, B, H, D, N, at, lstm = self.T, self.B, self.H, self.D, self.N, self.at, self.cell == "lstm"
        GH, saved, state = GATES[self.cell] * H, SAVED[self.cell] * H, B * H
        self.output, self.saved = self.empty(N, D * H), self.empty(D, N, max(1, saved))
        hn, cn, c = self.empty(D, B, H), self.empty(D, B, H), self.empty(D, B, H, dtype=torch.float32)
        w, b_ih, b_hh, h0, c0, mask = map(
            self.upload, (self.w_hh, self.b_ih, self.b_hh, self.h0, self.c0, self.mask)
        )
        offsets, exchange = self.upload(torch.tensor(self.offsets)), self.exchange(FORWARD, tile)
        for first, last in zip((0, *cuts), (*cuts, T), strict=True):
            words = [T, first, last, B, H, D, at(offsets) if self.packed else 0, exchange, 0]
            for d in range(2):
                if d >= D:
                    words += [0] * 14
                    continue
                early, late = (first, last) if d == 0 else (T - last, T - first)
                rows = slice(self.offsets[early], self.offsets[late])
                words += [at(self.upload(self.gates_x[d][rows])), rows.start, at(w, d * GH * H)]
                words += [at(b_ih, d * GH), at(b_hh, d * GH), at(mask), at(h0, d * state), at(c0, d * state)]
                words += [
                    at(hn, d * state),
                    at(cn, d * state) if lstm else 0,
                    at(c, d * state) if lstm else 0,
                ]
                words += [at(self.output, d * H), D * H, at(self.saved, d * N * saved) if saved else 0]
            self.run(FORWARD, tile, words)
        return tuple(map(self.machine.download, (self.output, hn, cn)))

    def backward(self, tile: Tile) -> dict[str, Tensor]:
        """The gradients of `reference`, by name; forward() must have run."""
        T, B, H, D, N, at, lstm = self.T, self.B, self.H, self.D, self.N, self.at, self.cell == "lstm"
        G, K, saved, state = GATES[self.cell], GATE_GRADS[self.cell], SAVED[self.cell] * H, B * H
        w, h0, c0, mask, grad = map(self.upload, (self.w_hh, self.h0, self.c0, self.mask, self.grad_output))
        dh = self.upload(self.grad_hn.float())
        carry = self.upload(self.grad_cn.float() if lstm else torch.zeros(D, B, H))
        dgates, previous = self.empty(D, N, K * H), self.empty(D, N, H)
        offsets = at(self.upload(torch.tensor(self.offsets))) if self.packed else 0
        words = [T, B, H, D, offsets, self.exchange(BACKWARD, tile), 0, 1]
        for d in range(2):
            if d >= D:
                words += [0] * 13
                continue
            words += [at(w, d * G * H * H), at(self.saved, d * N * saved), at(self.output, d * H), D * H]
            words += [
                at(h0, d * state),
                at(c0, d * state),
                at(mask),
                at(grad, d * H),
                D * H,
                at(dh, d * state),
            ]
            words += [
                at(carry, d * state) if K > 1 else 0,
                at(dgates, d * N * K * H),
                at(previous, d * N * H),
            ]
        self.run(BACKWARD, tile, words)
        grads = self.machine.download(dgates).double()
        before = self.machine.download(previous).double()
        to_h0 = self.machine.download(dh)
        result = {"w_hh": grads[..., : G * H].mT @ before, "previous": before}
        if self.cell == "gru":  # r, z, q, n: the candidate's two sides
            result["gates_x"] = torch.cat([grads[..., : 2 * H], grads[..., 3 * H :]], -1)
            to_h0 = to_h0 + self.machine.download(carry)
        else:
            result["gates_x"] = grads
        if lstm:
            result["c0"] = self.machine.download(carry)
        return {**result, "h0": to_h0}

    # ------------------------------------------------------------------------------------------ in float64

    def reference(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        def leaf(tensor: Tensor | None, *shape: int) -> Tensor:
            exact = torch.zeros(shape, dtype=torch.float64) if tensor is None else tensor.double()
            return exact.requires_grad_()

        B, H, D = self.B, self.H, self.D
        gates_x, w_hh = leaf(self.gates_x), leaf(self.w_hh)
        h0, c0 = leaf(self.h0, D, B, H), leaf(self.c0, D, B, H)
        b_ih, b_hh = (torch.zeros(D, 1) if b is None else b.double() for b in (self.b_ih, self.b_hh))
        outputs, last_h, last_c, previous = [], [], [], []
        for d in range(D):
            h, c, found, before = h0[d], c0[d], [], []
            for t in range(self.T)[:: 1 - 2 * d]:
                rows, n = slice(self.offsets[t], self.offsets[t + 1]), self.sizes[t]
                keep = torch.ones(n, 1) if self.mask is None else (~self.mask[rows]).double().unsqueeze(1)
                before.append(h[:n] * keep)
                x = (gates_x[d][rows] + b_ih[d]).unflatten(-1, (-1, H)).unbind(1)
                y = (before[-1] @ w_hh[d].t() + b_hh[d]).unflatten(-1, (-1, H)).unbind(1)
                new_h, new_c = _cell(self.cell, x, y, before[-1], c[:n] * keep)
                found.append(new_h)
                h, c = torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]])
            outputs.append(torch.cat(found[:: 1 - 2 * d]))
            previous.append(torch.cat(before[:: 1 - 2 * d]))
            last_h.append(h)
            last_c.append(c)
        output, hn, cn = torch.cat(outputs, -1), torch.stack(last_h), torch.stack(last_c)
        loss = (output * self.grad_output).sum() + (hn * self.grad_hn).sum()
        if self.cell == "lstm":
            loss = loss + (cn * self.grad_cn).sum()
        loss.backward()
        gradients: dict[str, Any] = {"gates_x": gates_x.grad, "w_hh": w_hh.grad, "h0": h0.grad, "c0": c0.grad}
        gradients["previous"] = torch.stack(previous)
        return tuple(t.detach() for t in (output, hn, cn)), gradients


def _cell(cell: str, x: Any, y: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    if cell == "lstm":
        i, f, g, o = (a + b for a, b in zip(x, y, strict=True))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "gru":
        r, z = (x[0] + y[0]).sigmoid(), (x[1] + y[1]).sigmoid()
        return (1 - z) * (x[2] + r * y[2]).tanh() + z * h, c
    both = x[0] + y[0]
    return (both.tanh() if cell == "rnn_tanh" else both.relu()), c
