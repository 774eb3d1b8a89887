"""What an installation says of itself, and what it says when its extension is missing or stale."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_rnn
from fused_rnn import _extension, info

PACKAGE = Path(fused_rnn.__file__).parent


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


def test_build_info() -> None:
    told = fused_rnn.build_info()
    assert told["fused_rnn"] == fused_rnn.__version__
    assert told["torch"] == torch.__version__
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["isa"] in told["isas"]
    assert told["isas"][-1] == "portable"
    assert told["threads"] == torch.get_num_threads()
    assert Path(told["extension"]).is_file()
    assert all(name.startswith(("sm_", "compute_")) for name in told["cuda_archs"])
    assert len(told["gpus"]) == torch.cuda.device_count()
    assert json.loads(json.dumps(told)) == told


def test_description_names_everything() -> None:
    told = {**fused_rnn.build_info(), "cuda_archs": ["sm_90a"], "torch_cuda": "13.0"}
    told["gpus"] = [{"name": "Some GPU", "capability": "9.0"}]
    text = info.describe(told)
    for part in (
        told["fused_rnn"],
        told["torch"],
        told["isa"],
        "sm_90a",
        "Some GPU (compute capability 9.0)",
    ):
        assert part in text
    without = info.describe({**told, "cuda_archs": [], "gpus": [], "torch_cuda": None})
    assert any(line.split()[:3] == ["CUDA", "code", "none:"] for line in without.splitlines())
    assert "this torch is built without CUDA" in without


def test_command_line(tmp_path: Path) -> None:
    text = python("-m", "fused_rnn", cwd=PACKAGE.parent)
    assert text.returncode == 0, text.stderr
    assert ["torch", torch.__version__] in [line.split() for line in text.stdout.splitlines()]
    as_json = python("-m", "fused_rnn", "--json", cwd=PACKAGE.parent)
    assert json.loads(as_json.stdout)["fused_rnn"] == fused_rnn.__version__


def stub(version: str, torch_version: str) -> SimpleNamespace:
    return SimpleNamespace(version=lambda: version, torch_version=lambda: torch_version)


def test_matching_extension_is_accepted() -> None:
    _extension.check(stub(fused_rnn.__version__, torch.__version__))
    assert _extension.load() is sys.modules["fused_rnn._C"]


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (stub("0.0.1", torch.__version__), r"stale: built from 0\.0\.1, this is"),
        (stub(fused_rnn.__version__, "2.1.0"), r"stale: built against torch 2\.1\.0, this is torch"),
        (SimpleNamespace(), "stale: it does not even say its version"),
    ],
)
def test_stale_extension(extension: SimpleNamespace, reason: str) -> None:
    with pytest.raises(ImportError, match=reason) as caught:
        _extension.check(extension)
    assert _extension.build_command() in str(caught.value)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package in it, but for its extension."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fused_rnn", ignore=ignored)
    return tmp_path


def import_error(folder: Path) -> str:
    done = python("-c", "import fused_rnn", cwd=folder)
    assert done.returncode == 1
    assert "ImportError: fused_rnn cannot start" in done.stderr, done.stderr
    return done.stderr


def test_missing_extension(copy: Path) -> None:
    told = import_error(copy)
    assert "its compiled extension is missing.\nBuild it with:" in told
    assert f"{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall ." in told


def test_missing_extension_in_a_checkout(copy: Path) -> None:
    (copy / "csrc").mkdir()
    (copy / "setup.py").touch()
    command = f"cd {copy} && {sys.executable} -m pip install --no-build-isolation --no-deps -e ."
    assert command in import_error(copy)


def test_extension_of_another_python(copy: Path) -> None:
    (copy / "fused_rnn" / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    assert "missing for this Python (found only _C.cpython-399-x86_64-linux-gnu.so)" in import_error(copy)


def test_extension_that_does_not_load(copy: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (copy / "fused_rnn" / f"_C{suffix}").write_bytes(b"not a shared object")
    assert f"does not load with torch {torch.__version__}" in import_error(copy)
