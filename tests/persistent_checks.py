"""What the tests of the persistent CUDA strategies on a GPU share. Everything here runs on two places: on a GPU, and in
small shapes on CPU tensors with emulated kernels, which shows on any machine that the checks themselves are right.

The bounds are those of test_cuda_persistent_scan.py: twice what the step kernels are off by, and two roundings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import emulated
import pytest
import torch
from test_cuda_persistent_scan import (
    EPS,
    NUMBERS,
    TF32,
    Values,
    as_good_as_steps,
    errors,
    gradients_like,
    is_tf32,
    rounding,
    use,
)
from test_ops import wanted_bits
from torch import Tensor

import fused_rnn
from fused_rnn import _C, ops

TIERS = ("block", "cluster", "grid")
PATIENCE = 30.0  # seconds for work of milliseconds


@dataclass(frozen=True)
class Place:
    """Where layers run: the device of their tensors, how a strategy is forced, and the GPU that plans are made for."""

    device: str
    forced: Callable[[str], AbstractContextManager[None]]
    arch: str  # "": this machine's GPU

    @contextmanager
    def open(self, numbers: str = "tf32") -> Iterator[None]:
        """Layers on `device` run on this GPU, float32 as `numbers` says."""
        before = torch.backends.cudnn.rnn.fp32_precision
        use(numbers)
        try:
            if self.device == "cuda":
                yield
            else:
                # Whoever waits for another block must give way to it.
                with emulated.unfair_schedules(), emulated.in_place_of_the_cpu():
                    yield
        finally:
            torch.backends.cudnn.rnn.fp32_precision = before

    def put(self, values: Values) -> Values:
        return [
            None if v is None else v if k == 1 and not v.is_floating_point() else v.to(self.device)
            for k, v in enumerate(values)
        ]

    def finish(self, what: str) -> None:
        """Wait for the GPU; but a kernel that never ends must not hold up the rest of a check. After it nothing more
        can run on this GPU in this process, so this ends the session, with its report."""
        if self.device != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + PATIENCE
        while not done.query():
            if time.monotonic() > deadline:
                pytest.exit(f"{what} did not end within {PATIENCE:.0f} s: a kernel hangs", returncode=1)
            time.sleep(0.0002)

    def plan(self, tier: str, cell: str, arguments: Values, dtype: torch.dtype) -> tuple[str, str]:
        """The strategies of both passes where `tier` is asked for, by the planner."""
        input, sizes, *_ = arguments
        T, B = input.shape[:2] if sizes is None else (sizes.numel(), int(sizes[0]))
        problem = {"cell": cell, "dtype": name_of(dtype), "T": T, "B": B, "I": input.size(-1)}
        problem |= {"H": arguments[5].size(1), "directions": 1 if arguments[9] is None else 2}
        packed = sizes is not None and input.size(0) != T * B
        with fused_rnn.force_plan(tier):
            plan = _C.plan(**problem, training=True, packed=packed, arch=self.arch)
        return plan["strategy"], plan["backward_strategy"]


EMULATED = Place("cpu", emulated.forced, "sm_90")
GPU = Place("cuda", fused_rnn.force_plan, "")


places = pytest.mark.parametrize(
    "place",
    [pytest.param(GPU, id="cuda", marks=pytest.mark.cuda), pytest.param(EMULATED, id="cuda-emulated")],
)


def places_and_numbers(*emulated: str):
    """The parameters `place` and `numbers` of a test: all of them on the GPU, and these in the emulation."""
    found = [pytest.param(GPU, n, marks=pytest.mark.cuda, id=f"cuda-{n}") for n in NUMBERS]
    found += [pytest.param(EMULATED, n, id=f"cuda-emulated-{n}") for n in emulated]
    return pytest.mark.parametrize("place, numbers", found)


def name_of(dtype: torch.dtype) -> str:
    """Of its numbers, by torch's switch."""
    return next(n for n, d in NUMBERS.items() if d == dtype and (n == "tf32") == is_tf32(dtype))


def both_passes(
    place: Place, cell: str, arguments: Values, gradients: Values, forward: str, backward: str
) -> Values:
    """Results, then gradients, on the CPU."""
    inputs = place.put(arguments)
    with place.forced(forward):
        output, hn, cn, saved = ops.layer_forward(cell, *inputs, True)
    there = [None if g is None else g.to(place.device) for g in gradients]
    with place.forced(backward):
        *found, _ = ops.layer_backward(cell, *there, *inputs, output, saved, wanted_bits(arguments))
    place.finish(f"{cell} {name_of(arguments[0].dtype)} by {forward}, {backward}")
    values = [output, hn, cn if cell == "lstm" else None, *found]
    return [None if v is None else v.cpu() for v in values]


def off_by(place: Place, cell: str, arguments: Values, tier: str) -> tuple[list[float], list[float]]:
    """The errors of a strategy against float64 on the CPU, and those of the step kernels."""
    dtype = arguments[0].dtype
    gradients, wanted = gradients_like(cell, arguments, dtype)
    ours = errors(both_passes(place, cell, arguments, gradients, tier, tier), wanted)
    if cell == "rnn_relu":
        # Its slope jumps at 0, and a rounding brings some sums to the other side: gradients by way of the step's sums.
        ours[2:] = errors(both_passes(place, cell, arguments, gradients, "step", tier), wanted)[2:]
    share = 1.0
    if is_tf32(dtype):  # the emulation's step kernels know no TF32: bfloat16 has three bits less
        arguments = [a.bfloat16() if a is not None and a.is_floating_point() else a for a in arguments]
        gradients, wanted = gradients_like(cell, arguments, torch.bfloat16)
        share = TF32 / EPS[torch.bfloat16]
    theirs = errors(both_passes(place, cell, arguments, gradients, "step", "step"), wanted)
    return ours, [share * error for error in theirs]


def check(place: Place, cell: str, arguments: Values, tier: str) -> tuple[str, str]:
    """Hold a strategy to its bound. What ran, by the planner."""
    as_good_as_steps(*off_by(place, cell, arguments, tier), rounding(arguments[0].dtype))
    return place.plan(tier, cell, arguments, arguments[0].dtype)


def same_bits(found: Values, expected: Values) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def reach(tier: str, dtype: torch.dtype) -> int:
    """The largest H, on sm_90 and sm_100; elsewhere a cluster reaches less."""
    return {"block": 128, "cluster": 512, "grid": 1024}[tier] // (2 if dtype == torch.float32 else 1)


def distance(found: Tensor, expected: Tensor) -> Tensor:
    """On the device, without a wait: the largest difference as a part of the largest number or of 1; NaN if one is."""
    if found.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=found.device)
    wide = expected.double()
    return (found.double() - wide).abs().max() / wide.abs().max().clamp(min=1.0)
