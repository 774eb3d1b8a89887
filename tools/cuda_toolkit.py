"""Finds the CUDA compiler and decides what it compiles for. setup.py uses it; it is not installed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

# Turing to Blackwell. 90 and not 90a, which has wgmma: no kernel uses it, and newer architectures share the PTX of 90.
# No 89, which runs the code of 86: nvcc 13.0 makes the same instructions for both, in every kernel. For 80 it does not.
CUDA_ARCHS = ("75", "80", "86", "90", "100", "120")

# The architectures that csrc/cuda/*.cu tell apart, by __CUDA_ARCH__.
GENERATIONS = (75, 80, 90)

# The names torch accepts in TORCH_CUDA_ARCH_LIST, for the architectures our kernels support.
NAMED_ARCHS = {
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0",
    "blackwell": "10.0;12.0+PTX",
}


class BuildError(SystemExit):
    """A build that cannot go on: SystemExit, so that the reader sees the sentence and not a traceback."""


@dataclass(frozen=True)
class Arch:
    """One entry of an architecture list, such as 9.0a or 12.0+PTX."""

    name: str  # "90a"
    ptx: bool = False

    @property
    def number(self) -> int:
        return int(self.name.rstrip("af"))

    @property
    def generation(self) -> str:
        """Of architectures that share one our sources see only the lowest that is built for, and are translated to PTX
        once for all: most of nvcc's time. One with a suffix shares with none."""
        return str(max(g for g in GENERATIONS if g <= self.number)) if self.name.isdigit() else self.name


def code_names(archs: Sequence[Arch]) -> list[tuple[str, str]]:
    """What to compile for these: pairs of a virtual architecture and of what is made of its PTX."""
    lowest: dict[str, Arch] = {}
    for arch in sorted(archs, key=lambda arch: arch.number):
        lowest.setdefault(arch.generation, arch)
    pairs = []
    for arch in archs:
        virtual = f"compute_{lowest[arch.generation].name}"
        pairs += [(virtual, f"sm_{arch.name}")] + ([(virtual, virtual)] if arch.ptx else [])
    return pairs


@dataclass(frozen=True)
class Toolkit:
    """The CUDA compiler that was found."""

    home: Path
    version: str
    archs: tuple[int, ...]  # what this nvcc can compile for: (75, 80, ..., 121)
    library_dir: Path  # holds libcudart_static.a


def parse_arch_list(text: str) -> list[Arch]:
    """Reads TORCH_CUDA_ARCH_LIST's format: "8.0;9.0a+PTX", "8.0 8.6", "Ampere"; "sm_80" and "80" too."""
    archs: dict[str, Arch] = {}
    for word in re.split(r"[;, ]+", text.strip("; ,")):
        for entry in NAMED_ARCHS.get(word.lower(), word).split(";"):
            match = re.fullmatch(r"(?:sm_)?(\d{1,2})\.?(\d)([af]?)(\+PTX)?", entry, re.IGNORECASE)
            if not match:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r} in {text!r};"
                    " expected something like '8.0;9.0a+PTX'."
                )
            name = match[1] + match[2] + match[3].lower()
            if int(match[1] + match[2]) < 75:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST: {entry} is older than 7.5 (Turing), which fused_rnn needs."
                )
            archs[name] = Arch(name, ptx=bool(match[4]) or (name in archs and archs[name].ptx))
    return sorted(archs.values(), key=lambda arch: (arch.number, arch.name))


def gpus_found() -> list[str]:
    """Compute capabilities of the GPUs in this machine, such as ["9.0"]; a CPU-only torch cannot see them."""
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}.{minor}" for major, minor in sorted(found)]
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return sorted(set(re.findall(r"^\d+\.\d+$", answer, re.MULTILINE)))
    return []


def choose_archs(toolkit: Toolkit, environ: Mapping[str, str], gpus: list[str]) -> list[Arch]:
    """The architectures to compile for, and all of them known to this nvcc."""
    listed = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed and listed != "native":
        archs = parse_arch_list(listed)
        unknown = [arch.name for arch in archs if arch.number not in toolkit.archs]
        if unknown:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: nvcc {toolkit.version} cannot compile for {', '.join(unknown)}."
            )
        return archs
    # A GPU below Turing in a machine with a newer one is no reason to fail: it is left out.
    mine = sorted({int(gpu.replace(".", "")) for gpu in gpus if int(gpu.replace(".", "")) >= 75})
    known = [number for number in mine if number in toolkit.archs]
    if mine and known == mine:
        return [Arch(str(number)) for number in mine]
    # No GPU, or one newer than this nvcc: everything, with PTX of the newest for the driver to translate.
    archs = [Arch(name) for name in CUDA_ARCHS if Arch(name).number in toolkit.archs]
    if not archs:
        raise BuildError(
            f"nvcc {toolkit.version} is too old: it knows none of the architectures {', '.join(CUDA_ARCHS)}. "
            "Install a newer CUDA toolkit, or set FUSED_RNN_CUDA=0 for a CPU build."
        )
    portable = [i for i, arch in enumerate(archs) if arch.name.isdigit()]
    if portable:
        archs[portable[-1]] = Arch(archs[portable[-1]].name, ptx=True)
    return archs


def find_toolkit(environ: Mapping[str, str]) -> Toolkit | None:
    """nvcc of CUDA_HOME or CUDA_PATH if one is set, else of PATH or /usr/local/cuda; None without one."""
    folders = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    candidates = [Path(folder, "bin", "nvcc") for folder in folders]
    if not candidates:
        on_path = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
        candidates = [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for nvcc in candidates:
        if os.access(nvcc, os.X_OK) and (toolkit := _ask(nvcc)):
            return toolkit
    return None


def _ask(nvcc: Path) -> Toolkit | None:
    """What this nvcc says of itself; None when it cannot run or its toolkit is incomplete.

    The folders come from a dry run: nvcc may be a wrapper script, or laid out in a distribution's own way.
    """
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    archs = tuple(int(number) for number in re.findall(r"compute_(\d+)\s", _output(nvcc, "--list-gpu-arch")))
    dry_run = _output(nvcc, "--dryrun", "-c", "x.cu")
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    libraries = re.search(r"^#\$ LIBRARIES=(.+)$", dry_run, re.MULTILINE)
    if not (version and archs and top and libraries):
        return None
    home = Path(top[1].strip()).resolve()
    folders = [Path(folder).resolve() for folder in re.findall(r'-L([^"\s]+)', libraries[1])]
    for folder in (*folders, home / "lib64", home / "lib"):
        if (home / "bin" / "nvcc").exists() and (folder / "libcudart_static.a").exists():
            return Toolkit(home, version[1], archs, folder)
    return None


def _output(*command: str | Path) -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    return ""


def wanted_toolkit(environ: Mapping[str, str]) -> Toolkit | None:
    """What FUSED_RNN_CUDA asks for: a toolkit, None for a CPU build, or a clear refusal."""
    wish = environ.get("FUSED_RNN_CUDA", "auto").strip().lower() or "auto"
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"FUSED_RNN_CUDA must be auto, 0 or 1, not {wish!r}.")
    if wish == "0":
        return None
    toolkit = find_toolkit(environ)
    if toolkit is None and wish == "1":
        raise BuildError(
            "FUSED_RNN_CUDA=1 asks for the CUDA kernels, but no nvcc with its libcudart_static.a was found in"
            " CUDA_HOME, PATH or /usr/local/cuda.\n"
            "Install the CUDA toolkit or set CUDA_HOME; FUSED_RNN_CUDA=0 builds for the CPU alone."
        )
    if wish == "auto" and (environ.get("FUSED_RNN_SANITIZE") or torch.version.hip):
        return None  # the sanitizers are for the CPU code; a ROCm torch would send .cu files to hipcc
    return toolkit


@contextlib.contextmanager
def torch_compiles_cuda(toolkit: Toolkit | None) -> Iterator[None]:
    """Makes torch's build step use our nvcc, whatever CUDA torch itself was built for, if any.

    Left alone it finds no nvcc when torch is CPU-only, refuses one of another major version, and tracks the
    headers of .cu files only when torch has CUDA. All that guards code which includes torch's headers.
    """
    saved = cpp_extension.CUDA_HOME, torch.version.cuda
    if toolkit:
        cpp_extension.CUDA_HOME, torch.version.cuda = str(toolkit.home), toolkit.version
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME, torch.version.cuda = saved
