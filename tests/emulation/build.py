"""Builds libraries of emulated kernels: CUDA sources as C++, seen by the emulation's callbacks, and its runtime.

    library = build.library("my_kernels", device=[Path("kernels.cu")])
    library = build.library("ops", device=[...], host=[Path("ops.cpp")], host_flags=["-I..."], link=["-ltorch"])

A library is built once for its content: objects and libraries lie in build/emulation under a hash of the compiler, the
flags, the source and every header that it could include.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "emulation"
CSRC = ROOT / "csrc"
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))

# The emulation's headers come first: they stand in for the toolkit's.
INCLUDE = ["-I", str(HERE / "include"), "-I", str(CSRC)]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]

# Instrumented. -g1: messages name the line. No SRA: it would turn a vector access into several of its parts.
# Kernels look at memory through pointers of several types, which nvcc allows.
DEVICE_FLAGS = [
    *COMMON,
    *["-O1", "-g1", "-fno-tree-sra", "-fno-ipa-sra", "-fno-strict-aliasing", "-ffp-contract=off"],
    *["-fsanitize=thread,alignment", "--param", "tsan-instrument-func-entry-exit=0"],
    *["--param", "tsan-distinguish-volatile=1", "-Wno-unknown-pragmas", "-DFRNN_EMULATION=1"],
    *INCLUDE,
    *["-x", "c++"],
]
# Not instrumented.
RUNTIME_FLAGS = [*COMMON, "-O2", "-g1", "-DFRNN_EMULATION=1", *INCLUDE]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none. It must be gcc: the flags are gcc's."""
    return shutil.which("g++") or shutil.which("c++")


@lru_cache(maxsize=1)
def _compiler_version() -> str:
    command = [compiler() or "c++", "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _headers(*folders: Path) -> list[Path]:
    return [p for folder in folders for p in sorted(folder.rglob("*")) if p.suffix in (".h", ".cuh", ".inc")]


def _digest(paths: Iterable[Path], words: Iterable[str]) -> str:
    content = hashlib.sha256(_compiler_version().encode())
    for word in words:
        content.update(word.encode() + b"\0")
    for path in paths:
        if path.is_file():
            content.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:24]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _object(source: Path, flags: Sequence[str], headers: Sequence[Path]) -> Path:
    target = OUT / "objects" / f"{source.stem}-{_digest([source, *headers], flags)}.o"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.tmp")
        _run([compiler() or "c++", *flags, "-c", str(source), "-o", str(made)])
        made.replace(target)  # at once: another process may be building the same
    return target


def library(
    name: str,
    device: Sequence[Path],
    *,
    device_flags: Sequence[str] = (),
    host: Sequence[Path] = (),
    host_flags: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """A shared library of kernels (`device`, with `device_flags` besides the emulation's), plain C++ (`host`, with
    flags of its own alone) and the emulation's runtime. `link` goes to the linker's end."""
    ours, all_headers = _headers(HERE), _headers(HERE, CSRC)
    (OUT / "objects").mkdir(parents=True, exist_ok=True)
    jobs = [(p, [*DEVICE_FLAGS[:-2], *device_flags, *DEVICE_FLAGS[-2:]], all_headers) for p in device]
    jobs += [(p, list(host_flags), all_headers) for p in host]
    jobs += [(p, RUNTIME_FLAGS, ours) for p in RUNTIME]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    key = hashlib.sha256("\0".join([_compiler_version(), *map(str, objects), *link]).encode()).hexdigest()[
        :24
    ]
    target = OUT / f"lib{name}-{key}.so"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.tmp")
        _run([compiler() or "c++", "-shared", *map(str, objects), "-o", str(made), *link, "-lrt"])
        made.replace(target)
    return target
