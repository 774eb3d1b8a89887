"""The parts of the demo char_lm.py: the text, the model, one contender that trains it, fair timing, and a type of its
arguments."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

GRADIENT_NORM = 1.0

State = Tensor | tuple[Tensor, Tensor] | None  # of the recurrent layers: (h, c) for an LSTM


def detached(state: State) -> State:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


class CharModel(nn.Module):
    """Embedding, recurrent layers, linear read-out. `library` is the module that has the recurrent class."""

    def __init__(self, library: ModuleType, cell: str, characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.recurrent = getattr(library, cell)(hidden, hidden, num_layers=layers)
        self.readout = nn.Linear(hidden, characters)

    def forward(self, characters: Tensor, state: State = None) -> tuple[Tensor, State]:
        output, state = self.recurrent(self.embedding(characters), state)
        return self.readout(output), state


@dataclass
class Contender:
    """One model in training, with what was measured of it."""

    name: str
    model: CharModel
    optimizer: torch.optim.Optimizer
    state: State = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of truncated backpropagation through time; the state goes on from the step before."""
        start = time.perf_counter()
        logits, state = self.model(inputs, self.state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.state = detached(state)


class Text:
    """A text as character numbers, cut into streams of equal length that are read side by side."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        number = {character: k for k, character in enumerate(self.alphabet)}
        self.numbers = torch.tensor([number[character] for character in text])

    def decode(self, numbers: list[int]) -> str:
        return "".join(self.alphabet[number] for number in numbers)

    def batches(self, rows: int, steps: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Endless (inputs, targets, whether a new pass begins), the tensors of shape (steps, rows)."""
        length = (len(self.numbers) - 1) // rows
        if length < steps:
            raise SystemExit(
                f"the text is too short: {len(self.numbers)} characters are not {rows} streams of {steps}"
            )
        inputs = self.numbers[: rows * length].view(rows, length).t()
        targets = self.numbers[1 : rows * length + 1].view(rows, length).t()
        while True:
            for start in range(0, length - steps + 1, steps):
                part = slice(start, start + steps)
                yield inputs[part].contiguous(), targets[part].contiguous(), start == 0


def read_text(path: Path | None) -> str:
    """The text to learn: a file, or the language reference that comes with Python."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--text {path}: {error}") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit(
            "this Python comes without pydoc_data.topics: give a text with --text FILE"
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


@torch.inference_mode()
def generate(model: CharModel, characters: int, temperature: float = 0.6, seed: int = 0) -> list[int]:
    """Writes a text, one character at a time: the state of the layers is all the memory there is."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [0]  # the first character of the alphabet, a line's end in any prose
    state: State = None
    for _ in range(characters):
        logits, state = model(torch.tensor([numbers[-1:]]), state)
        odds = (logits[-1, 0] / temperature).softmax(0)
        numbers.append(int(torch.multinomial(odds, 1, generator=generator)))
    return numbers[1:]


def interleaved(actions: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each action, run in turn so that whatever else the machine does meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repetition in range(-1, repetitions):  # one more, to warm up
        order = list(actions) if repetition % 2 == 0 else list(reversed(actions))
        for name in order:
            start = time.perf_counter()
            actions[name]()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def layers_alone(model: CharModel, rows: int, steps: int) -> Callable[[], None]:
    """Forward and backward of the recurrent layers on random input, without the rest of the model."""
    layers = model.recurrent
    values = torch.randn(steps, rows, layers.input_size, requires_grad=True)
    gradient = torch.randn(steps, rows, layers.hidden_size)

    def run() -> None:
        output, _ = layers(values)
        output.backward(gradient)
        layers.zero_grad()

    return run


def positive(kind: type) -> type:
    """An argparse type for numbers above zero."""

    def parse(word: str):
        number = kind(word)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{word} is not above zero")
        return number

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it in its message
    return parse
