"""A machine that runs kernels, as the tests of the emulation use it: the emulated device, or a GPU.

emulated = Emulated(build.library("my_kernels", [Path("kernels.cu")]))
x = emulated.upload(torch.ones(10))
assert emulated.call("run_my_kernel", x, 10) == 0, emulated.last_error()
y = emulated.download(x)
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch


class Buffer:
    """Global memory of the emulated device, with the contents of a tensor."""

    def __init__(self, library: ctypes.CDLL, tensor: torch.Tensor) -> None:
        self.like = tensor.contiguous()
        self.bytes = self.like.numel() * self.like.element_size()
        self._library = library
        self.address: int = library.frnn_emulation_malloc(self.bytes)
        ctypes.memmove(self.address, self.like.data_ptr(), self.bytes)

    def __del__(self) -> None:
        self._library.frnn_emulation_free(self.address)

    def at(self, offset: int) -> ctypes.c_void_p:
        """The address `offset` bytes behind the first."""
        return ctypes.c_void_p(self.address + offset)


class Emulated:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.frnn_emulation_malloc.restype = ctypes.c_void_p
        self.library.frnn_emulation_malloc.argtypes = [ctypes.c_size_t]
        self.library.frnn_emulation_free.argtypes = [ctypes.c_void_p]
        self.library.frnn_emulation_set_seed.argtypes = [ctypes.c_uint64]
        self.library.frnn_emulation_set_yield_probability.argtypes = [ctypes.c_double]
        self.library.frnn_emulation_schedule.restype = ctypes.c_uint64
        self.library.frnn_emulation_last_error.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Every schedule from here on follows from it."""
        self.library.frnn_emulation_set_seed(seed)

    def schedule(self) -> int:
        """Which thread ran when since seed(), as a hash."""
        return self.library.frnn_emulation_schedule()

    def last_error(self) -> str:
        return self.library.frnn_emulation_last_error().decode()

    def upload(self, tensor: torch.Tensor) -> Buffer:
        return Buffer(self.library, tensor)

    def download(self, buffer: Buffer) -> torch.Tensor:
        tensor = torch.empty_like(buffer.like)
        ctypes.memmove(tensor.data_ptr(), buffer.address, buffer.bytes)
        return tensor

    def call(self, function: str, *arguments: Any) -> int:
        """Calls a C function; a tensor is passed as the address of its host memory. Returns CUDA's error, 0 if none."""
        return getattr(self.library, function)(*map(_address, arguments))


class Gpu:
    """The same on this machine's GPU: a library that nvcc made, memory that torch gives."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def seed(self, seed: int) -> None:
        """A GPU has its own schedule."""

    def last_error(self) -> str:
        return ""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cuda()

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def call(self, function: str, *arguments: Any) -> int:
        torch.cuda.synchronize()  # torch's stream is another
        error = getattr(self.library, function)(*map(_address, arguments))
        torch.cuda.synchronize()
        return error


def _address(argument: Any) -> Any:
    if isinstance(argument, Buffer):
        return argument.at(0)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument
