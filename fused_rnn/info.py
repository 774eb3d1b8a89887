"""What this installation is: versions, CPU instruction sets, CUDA architectures, GPUs.

`python -m fused_rnn` prints it.
"""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _extension
from ._version import __version__


def build_info() -> dict[str, Any]:
    """Describes the installation in plain values, ready for `json.dump`.

    Keys: `fused_rnn`, `torch`, `python`, `platform` (versions); `extension` (path of the compiled module);
    `isa` and `isas` (CPU instruction set in use, and all that this machine can run); `threads`;
    `cuda_archs` (what csrc/cuda was compiled for; empty when built without nvcc);
    `torch_cuda` (the CUDA torch was built for, or None); `gpus` (name and compute capability of each).
    """
    extension = _extension.load()
    return {
        "fused_rnn": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": str(extension.__file__),
        "isa": extension.isa(),
        "isas": list(extension.isas()),
        "threads": torch.get_num_threads(),
        "cuda_archs": list(extension.cuda_archs()),
        "torch_cuda": torch.version.cuda,
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, Any]]:
    """Every CUDA GPU that torch can use here."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    return found


def describe(info: dict[str, Any]) -> str:
    """`build_info()` as the few lines a person wants to read or paste in a bug report."""
    if info["gpus"]:
        gpu = ", ".join(
            f"{found['name']} (compute capability {found['capability']})" for found in info["gpus"]
        )
    elif info["torch_cuda"] is None:
        gpu = "none usable: this torch is built without CUDA"
    else:
        gpu = "none found"
    lines = {
        "fused_rnn": info["fused_rnn"],
        "torch": info["torch"],
        "python": f"{info['python']} on {info['platform']}",
        "extension": info["extension"],
        "CPU kernels": f"{info['isa']} in use, of {', '.join(info['isas'])}; {info['threads']} threads",
        "CUDA code": ", ".join(info["cuda_archs"]) or "none: built for the CPU alone",
        "GPU": gpu,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
