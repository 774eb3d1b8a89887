"""Where a run took place: device, driver, versions, threads, commit, date. Goes into every result file."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .peers.base import Contender


def describe(device: str, contenders: Iterable[Contender]) -> dict[str, Any]:
    """The environment as JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "instruction_set": _instruction_set(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "contenders": {contender.name: contender.version() for contender in contenders},
    }


def cpu_name() -> str:
    """The processor's own name for itself, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree that the command runs in or from, with `+` for uncommitted changes.

    A copy of a tree that came without its .git is told by FUSED_RNN_COMMIT.
    """
    if told := os.environ.get("FUSED_RNN_COMMIT"):
        return told
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        git = ("git", "-C", str(root))
        if _output(*git, "ls-files", "--error-unmatch", "fused_rnn/__init__.py"):
            changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
            return f"{_output(*git, 'rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''}"
    return "unknown"


def available_memory(device: str) -> int | None:
    """Bytes that can still be allocated, or None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _driver() -> str | None:
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return query.splitlines()[0].strip() if query else None


def _instruction_set() -> str | None:
    """What fused_rnn's CPU kernels run on here; None when they are not built."""
    try:
        from fused_rnn import _C
    except ImportError:
        return None
    return _C.isa()


def _output(*command: str) -> str | None:
    """What a command prints, or None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
