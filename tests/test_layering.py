"""The rules that keep each kind of code in its room (see the map in CONTRIBUTING.md), read off the sources.

A line knows its room by what it mentions. These tests read `#include` and `import`, not the code's behaviour.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = {".h", ".hpp", ".inc", ".cpp", ".cu", ".cuh"}
TEXT = NATIVE | {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".in", ".cfg", ".json", ".sh", ""}
PLACES = ("csrc", "fused_rnn", "benchmarks", "examples", "tests", "tools", ".github", ".ci")

TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
CUDA = re.compile(r"^(cuda|cublas|cudnn|curand|cub/|cooperative_groups|cutlass|mma|sm_)")


def native_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in NATIVE)


def room(path: Path) -> str:
    """`cells`, `cpu`, `cuda`, `ops`, or "" for the files of csrc itself."""
    parts = path.relative_to(CSRC).parts
    return parts[0] if len(parts) > 1 else ""


def includes(path: Path) -> Iterator[tuple[str, Path | None]]:
    """What a file includes: the text, and the file of ours that it names, if it names one."""
    for match in re.finditer(r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', path.read_text(), re.MULTILINE):
        name = match.group(1) or match.group(2)
        own = [place / name for place in (path.parent, CSRC) if (place / name).is_file()]
        yield name, own[0].resolve() if own and match.group(2) else None


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


sources = pytest.mark.parametrize("path", native_sources(), ids=ids)


def test_there_is_something_to_read():
    assert {"cells", "cpu", "ops"} <= {room(path) for path in native_sources()}
    assert any(TORCH.match(name) for path in native_sources() for name, _ in includes(path))


@sources
def test_only_ops_knows_torch(path):
    """Nor by way of a header of ours that does."""
    if room(path) == "ops":
        assert path.suffix not in {".cu", ".cuh"}, "CUDA code that sees torch takes a minute to compile"
        return
    for name, own in includes(path):
        assert not TORCH.match(name), f"{name}: only csrc/ops includes torch's headers"
        assert own is None or room(own) != "ops", f"{name}: csrc/ops is included by nothing but itself"


@sources
def test_rooms_look_one_way(path):
    """ops -> cpu | cuda -> cells: a room includes itself, args.h and the rooms behind it."""
    behind = {
        "ops": {"ops", "cpu", "cuda", "cells", ""},
        "cpu": {"cpu", "cells", ""},
        "cuda": {"cuda", "cells", ""},
        "cells": {"cells"},
    }
    if room(path) == "":  # module.cpp sees all but ops; args.h nothing
        behind[""] = {"cpu", "cuda", "cells", ""} if path.suffix == ".cpp" else {""}
    for name, own in includes(path):
        assert own is None or room(own) in behind[room(path)], f"{name} is not behind csrc/{room(path)}"


@sources
def test_every_include_in_quotes_is_ours(path):
    text = path.read_text()
    quoted = re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)
    assert len(quoted) == len([own for _, own in includes(path) if own is not None])


@pytest.mark.parametrize("path", [path for path in native_sources() if room(path) == "cells"], ids=ids)
def test_cells_know_neither_torch_nor_cuda(path):
    """One unit at one time step, for host and device alike: mathematics, and the cells next door."""
    for name, own in includes(path):
        assert not CUDA.match(name), name
        assert own is not None or name in {
            "math.h",
            "cmath",
            "limits",
            "stdint.h",
            "cstdint",
            "type_traits",
        }, name


@pytest.mark.parametrize("path", [path for path in native_sources() if room(path) == "cpu"], ids=ids)
def test_cpu_knows_no_cuda(path):
    assert not [name for name, _ in includes(path) if CUDA.match(name)]


def python_sources(*places: str) -> list[Path]:
    return sorted(path for place in places for path in (ROOT / place).rglob("*.py"))


def spells_torch_ops(tree: ast.AST) -> bool:
    """`torch.ops`, `from torch import ops`, `from torch.ops import ...`, `import torch.ops`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "ops" and isinstance(node.value, ast.Name):
            if node.value.id == "torch":
                return True
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("torch.ops") or (
                node.module == "torch" and any(alias.name == "ops" for alias in node.names)
            ):
                return True
        elif isinstance(node, ast.Import) and any(alias.name.startswith("torch.ops") for alias in node.names):
            return True
    return False


def test_torch_ops_is_spelled_in_one_file():
    """A raw operator called on tensors that require grad drops the gradient without a word."""
    found = [
        path
        for path in python_sources("fused_rnn", "benchmarks", "examples")
        if spells_torch_ops(ast.parse(path.read_text()))
    ]
    assert found == [ROOT / "fused_rnn" / "ops.py"]


def test_the_package_imports_nothing_from_outside_it():
    """Neither benchmark nor tests: the package stands alone, on torch and the standard library."""
    for path in python_sources("fused_rnn"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] not in {"benchmarks", "fused_rnn_bench", "tests", "examples"}, (
                    path
                )
                assert not name.startswith("torch.testing"), path


def project_texts() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT)
    for place in PLACES:
        for path in (ROOT / place).rglob("*"):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def test_no_paths_of_one_machine():
    """Whoever clones this has another home, and another place for it."""
    homes = "|".join(("root", "home", "Users"))
    pattern = re.compile(rf"(?<![\w.$~/])/(?:{homes})/\w+")
    read = 0
    for path in project_texts():
        text = path.read_text(errors="replace")
        found = pattern.search(text)
        assert not found, f"{ids(path)}: {found and found.group()}"
        assert len(ROOT.parts) < 3 or str(ROOT) + "/" not in text, f"{ids(path)}: {ROOT}"
        read += 1
    assert read > 50
