"""Builds the kernels of Intel AMX apart from the extension, for the tests that run them on emulated tiles."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_law

from fused_rnn import _C

ROOT = Path(__file__).resolve().parents[1]

# As setup.py optimizes: one test compares bits with the extension, whose cells must add and multiply alike.
_FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
_FLAGS += ["-fno-math-errno", "-w"]


def build_kernels(folder: Path, entry: str, kernels: list[str], emulated: bool = True) -> ctypes.CDLL:
    """tests/amx/<entry>.cpp with the named files of csrc/cpu."""
    if "avx512_bf16" not in _C.isas():
        pytest.skip("this CPU has no AVX512_BF16, in which the code around the tiles is written")
    target = folder / f"{entry}.so"
    files = [ROOT / f"tests/amx/{entry}.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in kernels)]
    flags = [*_FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/amx'}"]
    if emulated:
        flags.append("-DFRNN_AMX_EMULATION")
    subprocess.run([shutil.which("g++") or "c++", "-shared", *flags, *files, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def on_hardware(by_operator: Callable) -> Callable:
    """By the operator, on a CPU that has such tiles."""
    if "amx" not in _C.isas():
        pytest.skip("this CPU has no AMX")
    return functools.partial(by_operator, isa="amx")


def assert_float_law(scan: Callable, by_operator: Callable, *cases: Any) -> None:
    """Beside the same scan in AVX-512, which has torch's accuracy or better."""
    assert_law(
        *(
            (scan(case), by_operator(case, "avx512"), by_operator(case.to(torch.float64), "portable"))
            for case in cases
        )
    )
