"""What one benchmark case is: a cell, a shape, a mode, a dtype, a device. Pure data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BenchError

LAYERS = ("lstm", "gru", "rnn", "rnn_relu")
SINGLE_STEPS = ("lstm_cell", "gru_cell", "rnn_cell")
CELLS = LAYERS + SINGLE_STEPS
GATES = {"lstm": 4, "gru": 3, "rnn": 1, "rnn_relu": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_cell": 1}

# penalty: a training step whose loss holds the squares of its gradients too, so that it takes a second derivative.
MODES = ("infer", "train", "penalty")
DEFAULT_MODES = ("infer", "train")
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp64")
ITEM_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp64": 8}

# How the sequences of a batch are given: one dense tensor, a PackedSequence of equal lengths, or a
# PackedSequence whose lengths fall evenly from T to T/4 (37.5 % fewer frames than the dense batch).
LENGTHS = ("dense", "equal", "varied")


@dataclass(frozen=True)
class Case:
    """One line of a benchmark. T, B, I, H are time steps, batch, input size and hidden size.

    For the `*_cell` kinds T is the number of calls in a Python loop, 1 for a single call.
    """

    cell: str
    mode: str
    dtype: str
    device: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: str = "dense"
    graph: bool = False
    note: str = ""

    @property
    def is_layer(self) -> bool:
        """True for RNN, LSTM and GRU, False for the single-step cells."""
        return self.cell in LAYERS

    @property
    def training(self) -> bool:
        return self.mode != "infer"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def has_cell_state(self) -> bool:
        return self.cell.startswith("lstm")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def sequence_lengths(self) -> list[int]:
        """The length of each of the B sequences, longest first."""
        if self.lengths != "varied" or self.B == 1:
            return [self.T] * self.B
        fall = 0.75 * self.T / (self.B - 1)
        return [max(1, round(self.T - fall * row)) for row in range(self.B)]

    @property
    def frames(self) -> int:
        """Time steps summed over the batch: what the recurrence really has to do."""
        return sum(self.sequence_lengths())

    @property
    def shape(self) -> str:
        """The shape and everything beside it that changes the work, for people: `50x32x128 varied`."""
        sizes = f"{self.T}x{self.B}x{self.H}" if self.I == self.H else f"{self.T}x{self.B}x{self.I}x{self.H}"
        extras = [f"L{self.layers}"] if self.layers > 1 else []
        extras += ["bi"] if self.bidirectional else []
        extras += [self.lengths] if self.lengths != "dense" else []
        extras += ["graph"] if self.graph else []
        return " ".join([sizes, *extras])

    @property
    def key(self) -> str:
        """The name by which `compare` finds the same case in another file. The note is no part of it."""
        sizes = f"T{self.T} B{self.B} I{self.I} H{self.H} L{self.layers}"
        direction = "bi" if self.bidirectional else "uni"
        launch = "graph" if self.graph else "eager"
        kind = f"{self.cell} {self.mode} {self.dtype} {self.device}"
        return f"{kind} {sizes} {direction} {self.lengths} {launch}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_CHOICES = {"cell": CELLS, "mode": MODES, "dtype": DTYPES, "device": ("cpu", "cuda"), "lengths": LENGTHS}


def case_from_json(data: Any) -> Case:
    """Rebuild a case from a result file or a worker's request, checking every field."""
    if not isinstance(data, dict):
        raise BenchError(f"a case should be an object, got {type(data).__name__}")
    known = {field.name: field for field in fields(Case)}
    if unknown := sorted(set(data) - set(known)):
        raise BenchError(f"a case has unknown fields: {', '.join(unknown)}")
    for name in ("cell", "mode", "dtype", "device", "T", "B", "I", "H"):
        if name not in data:
            raise BenchError(f"a case lacks its {name!r}")
    for name, value in data.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise BenchError(f"a case has {name} {value!r}; it should be one of {', '.join(_CHOICES[name])}")
        if known[name].type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise BenchError(f"a case has {name} {value!r}; it should be a positive integer")
        if known[name].type == "bool" and not isinstance(value, bool):
            raise BenchError(f"a case has {name} {value!r}; it should be true or false")
        if name == "note" and not isinstance(value, str):
            raise BenchError(f"a case has a note that is no text: {value!r}")
    return Case(**data)
