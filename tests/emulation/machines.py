"""Where the kernels of tests/emulation/kernels run: emulated, under several schedules, and on a GPU where there is one.

@on_machines
def test_something(make: Make) -> None:
    machine = make()
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from test_build import tools

from . import build
from .device import Emulated, Gpu

KERNELS = sorted((build.HERE / "kernels").glob("*.cu"))
SEEDS = range(4)

# CUDA's numbers
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9
ILLEGAL_ADDRESS, TIMEOUT, MISALIGNED, LAUNCH_FAILURE, TOO_LARGE = 700, 702, 716, 719, 720

Machine = Emulated | Gpu
Make = Callable[[], Machine]


@lru_cache(maxsize=1)
def _library() -> Emulated:
    return Emulated(build.library("kernels", KERNELS))


def emulated(seed: int = 0) -> Emulated:
    machine = _library()
    machine.seed(seed)
    machine.library.frnn_emulation_set_multiprocessors(132)
    return machine


def broken(flag: str, seed: int) -> Emulated:
    """The kernels of blocks.cu with a macro that breaks one of them."""
    machine = Emulated(
        build.library("broken", [build.HERE / "kernels/blocks.cu"], device_flags=[f"-D{flag}"])
    )
    machine.seed(seed)
    return machine


def nvcc() -> str:
    """That of the build, which may not be on PATH."""
    toolkit = tools.find_toolkit(os.environ)
    assert toolkit, "needs nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    return str(toolkit.home / "bin" / "nvcc")


@lru_cache(maxsize=1)
def gpu() -> Gpu:
    major, minor = torch.cuda.get_device_capability()
    path = Path(tempfile.mkdtemp(prefix="kernels-")) / "libkernels.so"
    arch = f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}"
    command = [nvcc(), "-std=c++17", "-O3", arch, "-shared", "-Xcompiler=-fPIC", f"-I{build.CSRC}"]
    subprocess.run([*command, *map(str, KERNELS), "-o", str(path)], check=True)
    return Gpu(path)


def has(machine: Machine, major: int) -> bool:
    """Whether the machine has what came with compute capability `major`.0; the emulated one has it all."""
    return isinstance(machine, Emulated) or torch.cuda.get_device_capability() >= (major, 0)


def ok(machine: Machine, function: str, *arguments: object) -> None:
    error = machine.call(function, *arguments)
    assert error == 0, f"{error}: {machine.last_error()}"


needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
on_machines = pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(partial(emulated, seed), id=f"seed{seed}", marks=needs_compiler) for seed in SEEDS),
        pytest.param(gpu, id="cuda", marks=pytest.mark.cuda),
    ],
)
