"""What the CUDA operators ask of a torch for CUDA (csrc/ops/cuda/gpu.cpp), as far as it runs without a GPU: on an
emulated CUDA runtime, with CPU tensors."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulation import build
from torch.utils import cpp_extension


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    flags += [word for path in cpp_extension.include_paths(device_type="cpu") for word in ("-isystem", path)]
    path = build.library(
        "real_gpu",
        device=[build.CSRC / "cuda" / "device.cu"],
        host=[build.CSRC / "ops" / "cuda" / "gpu.cpp", build.HERE / "real_gpu.cpp"],
        host_flags=flags,
        link=[f"-L{cpp_extension.library_paths(device_type='cpu')[0]}", "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    loaded = ctypes.CDLL(str(path))
    loaded.planned_arch.restype = ctypes.c_char_p
    loaded.allows_tf32.restype = ctypes.c_bool
    return loaded


def test_a_driver_that_is_too_old_is_said_so(library: ctypes.CDLL) -> None:
    """torch may come with an older CUDA runtime, which that driver is new enough for. With a newer one all is well."""
    library.frnn_emulation_set_old_driver(True)
    said = library.planned_arch().decode()
    library.frnn_emulation_set_old_driver(False)
    for words in (
        "compiled with CUDA 13.0",
        "cannot use cuda:0",
        "InsufficientDriver",
        "Update",
        "FUSED_RNN_CUDA=0",
    ):
        assert words in said
    assert library.planned_arch() == b"90"


# torch's numbers of its dtypes
@pytest.mark.parametrize("dtype, number", [("float", 6), ("double", 7), ("half", 5), ("bfloat16", 15)])
def test_torch_s_switch_is_touched_where_it_matters_alone(
    library: ctypes.CDLL, dtype: str, number: int
) -> None:
    """It is the whole process's, and other threads multiply too."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before, products = rnn.fp32_precision, matmul.fp32_precision
    rnn.fp32_precision = "tf32"
    try:
        assert library.allows_tf32(number) == (dtype == "float")
        assert matmul.fp32_precision == products
    finally:
        rnn.fp32_precision = before
