"""The build: which CUDA compiler and architectures it takes, what it refuses, and what it compiles again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import fused_rnn

ROOT = Path(__file__).resolve().parent.parent


def load_tool(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


tools = load_tool("cuda_toolkit")
NEWEST = tools.Toolkit(
    Path("/cuda"), "13.0", (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121), Path("/cuda")
)
OLDER = tools.Toolkit(Path("/cuda"), "12.4", (50, 60, 70, 75, 80, 86, 87, 89, 90), Path("/cuda"))


def names(archs) -> list[str]:
    return [arch.name + ("+PTX" if arch.ptx else "") for arch in archs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ["80"]),
        ("8.0;9.0a", ["80", "90a"]),
        ("9.0a 8.0", ["80", "90a"]),  # any separator, any order
        ("8.0, 8.6+PTX", ["80", "86+PTX"]),
        ("12.0;10.0+ptx", ["100+PTX", "120"]),
        ("sm_80;90a", ["80", "90a"]),
        ("8.0;8.0+PTX;8.0", ["80+PTX"]),  # once each
        ("Ampere", ["80", "86+PTX"]),
        ("hopper;12.1", ["90", "121"]),
    ],
)
def test_arch_list(text: str, expected: list[str]) -> None:
    assert names(tools.parse_arch_list(text)) == expected


@pytest.mark.parametrize("text", ["foo", "8", "8.0;;x", "8.0+PTXX", "-8.0", "8.0b"])
def test_arch_list_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: cannot read"):
        tools.parse_arch_list(text)


def test_arch_list_refuses_old_gpus() -> None:
    with pytest.raises(SystemExit, match=r"7\.0 is older than 7\.5"):
        tools.parse_arch_list("7.0;8.0")


def test_code_names() -> None:
    """Once to PTX for each generation, by the lowest of its architectures."""

    def of(text: str) -> list[tuple[str, str]]:
        return tools.code_names(tools.parse_arch_list(text))

    assert of("9.0a") == [("compute_90a", "sm_90a")]
    assert of("12.0+PTX") == [("compute_120", "sm_120"), ("compute_120", "compute_120")]
    assert of("7.5;8.6;8.0;9.0") == [
        ("compute_75", "sm_75"),
        ("compute_80", "sm_80"),
        ("compute_80", "sm_86"),
        ("compute_90", "sm_90"),
    ]
    assert of("9.0a;10.0;12.0+PTX") == [
        ("compute_90a", "sm_90a"),
        ("compute_100", "sm_100"),
        ("compute_100", "sm_120"),
        ("compute_100", "compute_100"),
    ]
    assert of("9.0;12.0+PTX") == [
        ("compute_90", "sm_90"),
        ("compute_90", "sm_120"),
        ("compute_90", "compute_90"),
    ]


def test_sources_tell_no_other_architectures_apart() -> None:
    compared = set()
    for path in (ROOT / "csrc" / "cuda").iterdir():
        compared |= {int(n) for n in re.findall(r"_ARCH(?:__)?\s*[<>=]+\s*\(?(\d+)", path.read_text())}
        assert path.name == "ptx.cuh" or "__CUDA_ARCH__" not in path.read_text(), path
    assert compared and compared <= {10 * number for number in tools.GENERATIONS}


@pytest.mark.parametrize(
    ("toolkit", "environ", "gpus", "expected"),
    [
        (NEWEST, {}, [], ["75", "80", "86", "90", "100", "120+PTX"]),
        (OLDER, {}, [], ["75", "80", "86", "90+PTX"]),
        (NEWEST, {}, ["9.0"], ["90"]),
        (NEWEST, {}, ["8.0", "12.1"], ["80", "121"]),
        (NEWEST, {}, ["6.1", "8.6"], ["86"]),
        (OLDER, {}, ["12.0"], ["75", "80", "86", "90+PTX"]),  # newer than nvcc: the driver translates
        (NEWEST, {"TORCH_CUDA_ARCH_LIST": "8.9"}, ["9.0"], ["89"]),
        (NEWEST, {"TORCH_CUDA_ARCH_LIST": "native"}, ["9.0"], ["90"]),
        (NEWEST, {"TORCH_CUDA_ARCH_LIST": " "}, ["9.0"], ["90"]),
    ],
)
def test_choice_of_architectures(toolkit, environ: dict, gpus: list[str], expected: list[str]) -> None:
    assert names(tools.choose_archs(toolkit, environ, gpus)) == expected


def test_architecture_that_nvcc_does_not_know() -> None:
    with pytest.raises(SystemExit, match=r"nvcc 12\.4 cannot compile for 120"):
        tools.choose_archs(OLDER, {"TORCH_CUDA_ARCH_LIST": "8.0;12.0"}, [])


def test_cuda_wanted_and_not_found(tmp_path: Path) -> None:
    environ = {"FUSED_RNN_CUDA": "1", "CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    with pytest.raises(SystemExit, match=r"FUSED_RNN_CUDA=1 asks for the CUDA kernels, but no nvcc"):
        tools.wanted_toolkit(environ)
    assert tools.wanted_toolkit({**environ, "FUSED_RNN_CUDA": "auto"}) is None
    assert tools.wanted_toolkit({**environ, "FUSED_RNN_CUDA": "0"}) is None
    with pytest.raises(SystemExit, match="FUSED_RNN_CUDA must be auto, 0 or 1, not 'yes'"):
        tools.wanted_toolkit({"FUSED_RNN_CUDA": "yes"})


def fake_nvcc(folder: Path) -> None:
    """A toolkit whose nvcc only knows how to describe itself, laid out as a distribution might."""
    (folder / "bin").mkdir(parents=True)
    (folder / "libraries").mkdir()
    script = folder / "bin" / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'Cuda compilation tools, release 12.4, V12.4.99';;\n"
        "  --list-gpu-arch) printf 'compute_75\\ncompute_90\\n';;\n"
        f"  --dryrun) echo '#$ TOP={folder}/bin/..'; echo '#$ LIBRARIES=  \"-L{folder}/libraries\"';;\n"
        "esac\n"
    )
    script.chmod(0o755)


def test_toolkit_is_what_nvcc_says(tmp_path: Path) -> None:
    home = tmp_path.resolve() / "cuda"
    fake_nvcc(home)
    environ = {"CUDA_HOME": str(home)}
    assert tools.find_toolkit(environ) is None  # no libcudart_static.a yet: of no use
    (home / "libraries" / "libcudart_static.a").touch()
    expected = tools.Toolkit(home, "12.4", (75, 90), home / "libraries")
    assert tools.find_toolkit(environ) == expected
    # A wrapper elsewhere on PATH leads to the same place.
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert tools.find_toolkit({"PATH": str(tmp_path)}) == expected
    assert tools.wanted_toolkit({**environ, "FUSED_RNN_SANITIZE": "address"}) is None


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Runs a command that must succeed, and returns all it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={
            **os.environ,
            "MAX_JOBS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    command = ("setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    run(sys.executable, *command, cwd=ROOT, FUSED_RNN_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"fused_rnn-{fused_rnn.__version__}.tar.gz"
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "tools/cuda_toolkit.py", "fused_rnn/py.typed"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for folder in ("fused_rnn", "benchmarks", "tests", "examples"):
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert needed <= held, sorted(needed - held)


MODULE = """
#include <pybind11/pybind11.h>
#include "number.h"
PYBIND11_MODULE(_C, m) {
  m.def("number", [] { return NUMBER; });
#ifdef FRNN_WITH_CUDA
  int kernel_number();
  m.def("kernel_number", kernel_number);
  m.def("archs", [] { return FRNN_CUDA_ARCHS; });
#endif
}
"""

KERNEL = """
#include "number.h"
#include <cuda_fp16.h>
__global__ void twice(__half* x) { x[0] = x[0] + x[0]; }  // operators as CUDA documents them
__attribute__((visibility("default"))) int kernel_number() { return NUMBER; }
"""


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """This project's build with an extension that compiles in seconds."""
    tree = tmp_path / "tree"
    (tree / "csrc" / "cuda").mkdir(parents=True)
    (tree / "fused_rnn").mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "tools", tree / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "README.md").write_text("A small tree.\n")
    (tree / "fused_rnn" / "__init__.py").touch()
    shutil.copy(ROOT / "fused_rnn" / "_version.py", tree / "fused_rnn")
    (tree / "csrc" / "module.cpp").write_text(MODULE)
    (tree / "csrc" / "number.h").write_text("#define NUMBER 1\n")
    return tree


def ask(tree: Path, expression: str) -> str:
    return run(
        sys.executable, "-c", f"import torch; from fused_rnn import _C; print({expression})", cwd=tree
    ).strip()


def test_only_what_changed_is_compiled_again(small_tree: Path) -> None:
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    first = run(*build, cwd=small_tree, FUSED_RNN_CUDA="auto")
    assert "[1/1]" in first and "no CUDA sources: CPU only" in first
    assert ask(small_tree, "_C.number()") == "1"
    assert "no work to do" in run(*build, cwd=small_tree, FUSED_RNN_CUDA="auto")
    (small_tree / "csrc" / "number.h").write_text("#define NUMBER 2\n")
    assert "[1/1]" in run(*build, cwd=small_tree, FUSED_RNN_CUDA="auto")
    assert ask(small_tree, "_C.number()") == "2"


@pytest.mark.skipif(tools.find_toolkit(os.environ) is None, reason="needs nvcc, and this machine has none")
def test_cuda_sources_are_compiled_for_any_torch(small_tree: Path) -> None:
    (small_tree / "csrc" / "cuda" / "kernel.cu").write_text(KERNEL)
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    wish = {"FUSED_RNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0+PTX"}
    assert "CUDA kernels for sm_80 + PTX" in run(*build, cwd=small_tree, **wish)
    assert ask(small_tree, "_C.kernel_number(), _C.archs()") == "1 sm_80;compute_80"
    (small_tree / "csrc" / "number.h").write_text("#define NUMBER 2\n")
    assert "nvcc" in run(*build, cwd=small_tree, **wish)  # headers of .cu files are tracked too
    assert ask(small_tree, "_C.kernel_number()") == "2"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler, and this machine has none")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_kernels_keep_to_cpp17(source: Path) -> None:
    """Only torch's headers need C++20; nvcc compiles the code that both sides share as C++17."""
    flags = (
        "-std=c++17",
        "-fsyntax-only",
        "-fopenmp",
        "-Wall",
        "-Wno-psabi",
        "-Werror",
        "-Wno-error=attributes",
    )
    run("c++", *flags, "-I", ROOT / "csrc", source, cwd=ROOT)


def test_one_openmp_runtime() -> None:
    """Two in one process would each keep as many threads as there are cores."""
    script = (
        "import fused_rnn, torch; fused_rnn.LSTM(4, 4)(torch.randn(3, 2, 4));"
        "paths = {line.split()[-1] for line in open('/proc/self/maps')};"
        "print(*(path for path in paths if 'libgomp' in path or 'omp.so' in path))"
    )
    loaded = run(sys.executable, "-c", script, cwd=ROOT).splitlines()[-1].split()
    assert len(loaded) == 1, loaded
