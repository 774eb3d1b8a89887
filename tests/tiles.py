"""Builds the kernels of Intel AMX apart from the extension, for the tests that run them on emulated tiles."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

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
