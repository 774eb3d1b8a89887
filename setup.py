"""Builds the extension `fused_rnn._C`; everything else about the package is in pyproject.toml.

One shared object is made of three kinds of source: csrc/ops knows torch, the rest of the C++ does not, and
csrc/cuda/*.cu goes through nvcc wherever one is found, whether or not torch itself was built for CUDA: those
files include no torch header and link the CUDA runtime statically, so they need nothing from torch.

Environment:
    FUSED_RNN_CUDA=auto|0|1       auto (default): build csrc/cuda when nvcc is found; 1: fail when it is not
    TORCH_CUDA_ARCH_LIST          e.g. "8.0;9.0a+PTX"; default: this machine's GPUs, else CUDA_ARCHS below
    FUSED_RNN_SANITIZE=address,undefined     a build for debugging, CPU only, in an object folder of its own
    MAX_JOBS                      compilers run at once
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # pip runs this file from anywhere, and its folder is not on the path

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "fused_rnn builds against the torch you already have, and none can be imported here.\n"
        "Install torch (2.11 or newer) first, then run: pip install --no-build-isolation .\n"
        f"({error})"
    ) from error

from cuda_toolkit import (  # noqa: E402
    Arch,
    BuildError,
    Toolkit,
    choose_archs,
    code_names,
    gpus_found,
    torch_compiles_cuda,
    wanted_toolkit,
)


def openmp_link_flag() -> str:
    """Links the OpenMP runtime that torch itself loads: two in one process would fight over the cores.

    Most wheels carry it under gcc's own name, and -fopenmp finds it; some carry it under a mangled one.
    """
    torch_dir = Path(torch.__file__).parent
    for folder in (torch_dir / "lib", torch_dir.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp-*.so*")):
            return str(library)
    return "-fopenmp"


def sources(*suffixes: str) -> list[str]:
    """Sources below csrc, relative to this file as setuptools wants them."""
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in found)


def extension(
    environ: Mapping[str, str], toolkit: Toolkit | None, archs: list[Arch], version: str
) -> Extension:
    """fused_rnn._C with every flag it is compiled with."""
    cpp, cuda = sources(".cpp"), sources(".cu") if toolkit else []
    if not toolkit:  # these call the kernels that nvcc compiles
        cpp = [path for path in cpp if not path.startswith(str(Path("csrc", "ops", "cuda")))]
    cxx = [
        "-O3",
        "-std=c++20",  # for torch's headers; csrc outside ops/ keeps to C++17
        "-g0",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        f'-DFRNN_VERSION="{version}"',
        f'-DFRNN_TORCH_VERSION="{torch.__version__}"',
    ]
    # As system headers and for the C++ compiler only: they warn no more, and no .cu file can include them.
    for folder in cpp_extension.include_paths(device_type="cpu"):
        cxx += ["-isystem", folder]
    link = [openmp_link_flag()]
    nvcc = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"]
    # torch's build switches these operators off for its own sources; ours uses them as CUDA documents them.
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"):
        nvcc.append(f"-U__CUDA_NO_{name}__")
    if cuda and toolkit:
        pairs = code_names(archs)
        cxx += ["-DFRNN_WITH_CUDA", f'-DFRNN_CUDA_ARCHS="{";".join(code for _, code in pairs)}"']
        nvcc += ["-DFRNN_WITH_CUDA"] + [f"-gencode=arch={virtual},code={code}" for virtual, code in pairs]
        link += [f"-L{toolkit.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link += [
            "-Wl,--exclude-libs,libcudart_static.a"
        ]  # or torch's own CUDA runtime could be bound to our copy
    sanitizers = environ.get("FUSED_RNN_SANITIZE", "")
    if sanitizers:
        debug = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        cxx += [*debug, "-O1", "-g"]
        link += debug
    flags = {"cxx": cxx, "nvcc": nvcc}
    made = cpp_extension.CppExtension(
        "fused_rnn._C", cpp + cuda, extra_compile_args=flags, extra_link_args=link, py_limited_api=False
    )
    made.include_dirs = [str(ROOT / "csrc")]
    return made


class BuildExtension(cpp_extension.BuildExtension):
    """torch's ninja build, with a lasting folder of objects per configuration and a plain word at the end."""

    toolkit: Toolkit | None = None
    archs: Sequence[Arch] = ()

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would compile in a temporary folder, and everything again the next time.
        flavour = [f"cp{sys.version_info.major}{sys.version_info.minor}", f"torch{torch.__version__}"]
        flavour += [word for word in os.environ.get("FUSED_RNN_SANITIZE", "").split(",") if word]
        self.build_temp = str(ROOT / "build" / "-".join(["objects", *flavour]))

    def build_extensions(self) -> None:
        if not self.use_ninja:
            raise BuildError("fused_rnn builds with ninja, which was not found: pip install ninja")
        with torch_compiles_cuda(self.toolkit):
            super().build_extensions()
        print(f"fused_rnn: built {self.extensions[0].name}: {self.describe()}", flush=True)

    def describe(self) -> str:
        x86 = platform.machine() in ("x86_64", "AMD64")
        wide = "amx, avx512_bf16, avx512, avx2 and portable code" if x86 else "portable code"
        text = f"CPU kernels with {wide} (chosen at run time)"
        if not sources(".cu"):
            return text + "; no CUDA sources: CPU only"
        if not self.toolkit:
            switched_off = os.environ.get("FUSED_RNN_CUDA") == "0" or os.environ.get("FUSED_RNN_SANITIZE")
            return text + ("; CUDA switched off: CPU only" if switched_off else "; no nvcc found: CPU only")
        names = ", ".join(f"sm_{arch.name}{' + PTX' if arch.ptx else ''}" for arch in self.archs)
        return text + f"; CUDA kernels for {names} (nvcc {self.toolkit.version})"


class BuildPy(build_py):
    """Forgets modules of an earlier build: build/lib would otherwise bring deleted files into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            for name in {package.split(".")[0] for package in self.distribution.packages}:
                shutil.rmtree(Path(self.build_lib, name), ignore_errors=True)
        super().run()


def packages() -> dict[str, str]:
    """Package name -> folder. benchmarks/ is installed under a name of our own: `benchmarks` is anybody's."""
    found: dict[str, str] = {}
    for name, folder in (("fused_rnn", "fused_rnn"), ("fused_rnn_bench", "benchmarks")):
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / folder).parts
            found[".".join((name, *inner))] = str(Path(folder, *inner))
    return found


def main() -> None:
    if sys.platform != "linux":
        raise BuildError(f"fused_rnn builds on Linux; this is {sys.platform}.")
    scope: dict[str, str] = {}
    exec((ROOT / "fused_rnn" / "_version.py").read_text(), scope)
    toolkit = wanted_toolkit(os.environ)
    archs = choose_archs(toolkit, os.environ, gpus_found()) if toolkit else []
    BuildExtension.toolkit, BuildExtension.archs = toolkit, archs
    folders = packages()
    setup(
        packages=list(folders),
        package_dir={"fused_rnn": "fused_rnn", "fused_rnn_bench": "benchmarks"},
        ext_modules=[extension(os.environ, toolkit, archs, scope["__version__"])],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
    )


if __name__ == "__main__":
    main()
