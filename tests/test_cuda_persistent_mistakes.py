"""That the emulation finds a mistake in the exchange of persistent kernels, or a number that is rounded. One kernel at
a time is compiled from a copy of the sources in which a line is changed, and must fail in some schedule, as it must not
without the change."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulation import build
from emulation.device import Emulated
from persistent_layer import NUMBERS, Layer, attach, tile


class Mistake(NamedTuple):
    kernel: str
    file: str
    line: str  # there once
    instead: str = ""


KERNELS = {
    "block": ("block", 1, 1),
    "cluster": ("cluster", 2, 1),
    "grid": ("grid", 4, 1),
    "exact": ("cluster", 4, 1),
}
MISTAKES = {
    "block: no barrier": Mistake(
        "block", "exchange.cuh", "    __syncthreads();\n    ++message_;", "    ++message_;"
    ),
    "cluster: starts without the others": Mistake(
        "cluster",
        "exchange.cuh",
        "  __device__ __forceinline__ const T* start() const {\n    cluster_arrive();\n    cluster_wait();",
        "  __device__ __forceinline__ const T* start() const {\n    __syncthreads();",
    ),
    "cluster: sends what is being staged": Mistake(
        "cluster",
        "exchange.cuh",
        "    __syncthreads();\n    if (is_given_up(gave_up_)) return;",
        "    if (is_given_up(gave_up_)) return;",
    ),
    "cluster: overwrites what is being read": Mistake(
        "cluster", "exchange.cuh", "if (threadIdx.x == 0 && message_ > 0)", "if (false)"
    ),
    "cluster: expects no bytes": Mistake(
        "cluster",
        "exchange.cuh",
        "if (threadIdx.x == 0 && !is_given_up(gave_up_)) mbarrier_arrive_expect(&full_[tile], message_bytes_);",
        "if (threadIdx.x == 0) mbarrier_arrive(&full_[tile]);",
    ),
    "cluster: expects too few bytes": Mistake(
        "cluster",
        "exchange.cuh",
        "if (threadIdx.x == 0 && !is_given_up(gave_up_)) mbarrier_arrive_expect(&full_[tile], message_bytes_);",
        "if (threadIdx.x == 0) mbarrier_arrive_expect(&full_[tile], message_bytes_ - 16);",
    ),
    "cluster: waits for the wrong phase": Mistake(
        "cluster",
        "exchange.cuh",
        "mbarrier_wait<Reach::stores>(&full_[tile], message_ / kTiles % 2, gave_up_);",
        "mbarrier_wait<Reach::stores>(&full_[tile], message_ / kTiles % 2 ^ 1, gave_up_);",
    ),
    "grid: takes what is there": Mistake(
        "grid",
        "exchange.cuh",
        "return (pair[0].number == message_) & (alone_ | (pair[1].number == message_));",
        "return pair[0].number >= message_ - 1;",
    ),
    "grid: looks at the first word only": Mistake(
        "grid",
        "exchange.cuh",
        "return (pair[0].number == message_) & (alone_ | (pair[1].number == message_));",
        "return pair[0].number == message_;",
    ),
    "grid: multiplies before all have received": Mistake(
        "grid",
        "exchange.cuh",
        "      }\n    }\n    __syncthreads();\n    return initial();",
        "      }\n    }\n    return initial();",
    ),
    "grid: takes what the launch before has left": Mistake(
        "grid", "persistent.cuh", "static_cast<size_t>(bytes), static_cast", "0, static_cast"
    ),
    "forward: adds sums that are not there": Mistake(
        "cluster", "persistent_forward.cuh", "      if constexpr (kGroups > 1) __syncthreads();\n", ""
    ),
    "backward: adds sums that are not there": Mistake(
        "grid", "persistent_backward.cuh", "      if constexpr (kGroups > 1) __syncthreads();\n", ""
    ),
    "forward: overwrites weights on their way": Mistake(
        "block",
        "persistent_forward.cuh",
        "    __syncthreads();\n\n    SharedRoom room;",
        "\n    SharedRoom room;",
    ),
    "inputs: nobody waits for them": Mistake("block", "tile.cuh", "copy_wait<kAhead - 1>();", ""),
    "exact: a state rounded to TF32": Mistake(
        "exact", "tile.cuh", "if constexpr (std::is_same_v<T, float>) {", "if constexpr (sizeof(T) == 4) {"
    ),
}


def compiled(kernel: str, mistake: Mistake | None) -> Emulated:
    exchange, k_groups, _ = KERNELS[kernel]
    text = {}
    for path in [*build.CSRC.glob("cuda/*.cuh"), *build.CSRC.glob("cuda/*.h"), *build.CSRC.glob("cells/*.h")]:
        text[f"{path.parent.name}/{path.name}"] = path.read_text()
    if mistake:
        wrong = text[f"cuda/{mistake.file}"]
        assert wrong.count(mistake.line) == 1, f"{mistake.file} has changed: where is {mistake.line!r}?"
        text[f"cuda/{mistake.file}"] = wrong.replace(mistake.line, mistake.instead)
    text["dtypes.h"] = (build.CSRC / "dtypes.h").read_text()
    text["one.cu"] = (build.HERE / "persistent_one.cu").read_text()
    digest = hashlib.sha256(repr(sorted(text.items())).encode()).hexdigest()[:16]
    folder = build.OUT / "mistakes" / digest
    if not folder.exists():
        made = Path(f"{folder}.tmp")
        shutil.rmtree(made, ignore_errors=True)
        for name, content in text.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(content)
        made.replace(folder)
    flags = ["-DCELL=Gru", f"-DK_GROUPS={k_groups}", f"-DEXCHANGE=Exchange::{exchange}"]
    flags.append("-DNUMBER=" + ("Exact" if kernel == "exact" else "BFloat16"))
    return attach(Emulated(build.library("mistake", [folder / "one.cu"], device_flags=flags)))


def fails(kernel: str, machine: Emulated, seed: int) -> str:
    """What is wrong with a forward pass, in two launches, and a backward pass in one schedule; empty: nothing."""
    machine.seed(seed)
    machine.library.frnn_emulation_set_yield_probability(0.05)
    numbers = "fp32" if kernel == "exact" else "bf16"
    layer = Layer(machine, "gru", numbers, T=5, B=3, H=66)
    bound = 6 * NUMBERS[numbers][1]
    shape = tile(*KERNELS[kernel])
    try:
        states, gradients = layer.reference()
        pairs = list(zip(layer.forward(shape, cuts=(2,))[:2], states, strict=False))
        pairs += [(ours, gradients[key]) for key, ours in layer.backward(shape).items()]
    except RuntimeError as error:
        return str(error)
    for ours, theirs in pairs:
        if not torch.allclose(ours.double(), theirs, rtol=bound, atol=bound * theirs.abs().max().item()):
            return "wrong numbers"
    return ""


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_mistake(kernel: str) -> None:
    machine = compiled(kernel, None)
    for seed in range(6):
        assert fails(kernel, machine, seed) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(name: str) -> None:
    mistake = MISTAKES[name]
    machine = compiled(mistake.kernel, mistake)
    assert any(fails(mistake.kernel, machine, seed) for seed in range(100)), name
