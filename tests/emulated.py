"""The CUDA backend without a GPU: its operators on CPU tensors, its kernels emulated (tests/emulation)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from emulation import build
from torch.utils import cpp_extension

from fused_rnn import ops

OPERATORS = ("layer_forward", "layer_backward", "cell_forward", "cell_backward")
HERE = Path(__file__).resolve().parent / "emulation"


@lru_cache(maxsize=1)
def load() -> SimpleNamespace:
    """Compiles (once) and loads; `operators` by name, and `runtime`, the C functions of runtime/exported.h."""
    csrc = build.CSRC
    cuda = csrc / "ops" / "cuda"
    host = [csrc / "ops" / name for name in ("problem.cpp", "forward.cpp", "backward.cpp")]
    host += [path for path in sorted(cuda.glob("*.cpp")) if path.name != "gpu.cpp"]  # it has one of its own
    host += [*sorted((csrc / "cuda").glob("*.cpp")), HERE / "gpu.cpp", HERE / "operators.cpp"]
    flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    flags += [word for path in cpp_extension.include_paths(device_type="cpu") for word in ("-isystem", path)]
    folder = cpp_extension.library_paths(device_type="cpu")[0]
    path = build.library(
        "operators",
        device=sorted((csrc / "cuda").glob("*.cu")),
        host=host,
        host_flags=flags,
        link=[f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    torch.ops.load_library(str(path))
    runtime = ctypes.CDLL(str(path))
    runtime.frnn_emulation_last_error.restype = ctypes.c_char_p
    runtime.frnn_emulation_set_seed.argtypes = [ctypes.c_uint64]
    runtime.frnn_emulation_set_yield_probability.argtypes = [ctypes.c_double]
    runtime.frnn_emulation_guard_tensors.argtypes = [ctypes.c_bool]
    runtime.frnn_emulation_schedule.restype = ctypes.c_uint64
    runtime.frnn_emulation_force_strategy.argtypes = [ctypes.c_char_p]
    runtime.frnn_emulation_force_strategy.restype = ctypes.c_bool
    runtime.frnn_emulation_plan_for.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    runtime.frnn_emulation_break.argtypes = [ctypes.c_bool, ctypes.c_bool]
    runtime.frnn_emulation_set_capturing.argtypes = [ctypes.c_bool]
    registered = torch.ops.fused_rnn_emulated
    operators = {name: getattr(registered, name).default for name in OPERATORS}
    return SimpleNamespace(operators=SimpleNamespace(**operators), runtime=runtime)


@contextlib.contextmanager
def guarded_tensors() -> Iterator[None]:
    """Tensors made inside lie in memory that the emulation knows; kernels may touch no others."""
    runtime = load().runtime
    runtime.frnn_emulation_guard_tensors(True)
    try:
        yield
    finally:
        runtime.frnn_emulation_guard_tensors(False)


@contextlib.contextmanager
def forced(strategy: str) -> Iterator[None]:
    """`fused_rnn.force_plan` for the emulated operators, which have a planner of their own."""
    force = load().runtime.frnn_emulation_force_strategy
    assert force(strategy.encode()), strategy
    try:
        yield
    finally:
        force(None)


@contextlib.contextmanager
def a_gpu(*, arch: int = 90, multiprocessors: int = 132, planned: int = 0, memory: int = 0) -> Iterator[None]:
    """The emulated GPU of this size, and what the planner takes it for: an architecture, so many multiprocessors, so
    much memory. In it as after it, no persistent kernel has been checked yet."""
    runtime = load().runtime
    runtime.frnn_emulation_set_multiprocessors(multiprocessors)
    runtime.frnn_emulation_plan_for(arch, planned, memory)
    runtime.frnn_emulation_forget_checks()
    try:
        yield
    finally:
        runtime.frnn_emulation_set_multiprocessors(132)
        runtime.frnn_emulation_plan_for(90, 0, 0)
        runtime.frnn_emulation_forget_checks()


@contextlib.contextmanager
def broken(*, messages: bool = False, products: bool = False) -> Iterator[None]:
    """An emulated GPU that loses the messages between blocks, or whose matrix instructions are wrong."""
    runtime = load().runtime
    runtime.frnn_emulation_break(messages, products)
    try:
        yield
    finally:
        runtime.frnn_emulation_break(False, False)


@contextlib.contextmanager
def kernels_of_an_older_gpu() -> Iterator[None]:
    """As if the driver had translated the persistent kernels from PTX for a GPU that has none."""
    runtime = load().runtime
    runtime.frnn_emulation_set_threads_of_kernels(32)
    try:
        yield
    finally:
        runtime.frnn_emulation_set_threads_of_kernels(1024)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """As if every stream were being captured in a CUDA graph."""
    runtime = load().runtime
    runtime.frnn_emulation_set_capturing(True)
    try:
        yield
    finally:
        runtime.frnn_emulation_set_capturing(False)


def on_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Copies the operands to where kernels may read: a test's may be older than its `guarded_tensors`."""

    def call(*arguments: Any) -> Any:
        return operator(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))

    return call


@contextlib.contextmanager
def unfair_schedules() -> Iterator[None]:
    """Threads give way at one access in fifty, from one seed on."""
    runtime = load().runtime
    runtime.frnn_emulation_set_seed(1)
    runtime.frnn_emulation_set_yield_probability(0.02)
    try:
        yield
    finally:
        runtime.frnn_emulation_set_yield_probability(0.0)


@contextlib.contextmanager
def in_place_of_the_cpu() -> Iterator[None]:
    """Everything that calls the operators, down from the modules, computes on the emulated GPU."""
    ours = {name: getattr(ops, name) for name in (*OPERATORS, "cell_at_once", "layer_at_once")}
    with guarded_tensors():
        for name in OPERATORS:
            setattr(ops, name, on_device(getattr(load().operators, name)))
        ops.cell_at_once = ops.layer_at_once = lambda *_: None  # which know the CPU's kernels alone
        try:
            yield
        finally:
            for name, operator in ours.items():
                setattr(ops, name, operator)
