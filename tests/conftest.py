"""Settings shared by the whole test-suite: markers, devices and instruction sets, seeds, hypothesis."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import emulated
import pytest
import torch
from hypothesis import HealthCheck, settings

from fused_rnn import _C

# torch looks at it once, at a process's first product on a GPU, and under torch.use_deterministic_algorithms refuses
# every product of a process that had begun without.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The same examples in every run, so that a failure on one machine is a failure on the next; no deadline,
# since a shared runner may stall at any line. Property tests set their own number of examples.
settings.register_profile(
    "fused_rnn",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fused_rnn")

# What computes: each CPU instruction set this machine can run, the CUDA backend with emulated kernels, and the GPU
# where there is one.
BACKENDS = [pytest.param(("cpu", isa), id=f"cpu-{isa}") for isa in _C.isas()]
BACKENDS.append(pytest.param(("emulated", None), id="cuda-emulated"))
DEVICES = [pytest.param("cpu", id="cpu")]
if torch.cuda.is_available():
    BACKENDS.append(pytest.param(("cuda", None), id="cuda", marks=pytest.mark.cuda))
    DEVICES.append(pytest.param("cuda", id="cuda", marks=pytest.mark.cuda))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")
    # torch.nn's, once a process, about its own projected LSTM
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same seed, on one thread unless it asks for more (small tensors gain nothing
    by more, and on a busy machine lose much), and leaves the process-wide settings as it found them."""
    dtype, threads, isa = torch.get_default_dtype(), torch.get_num_threads(), _C.isa()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    _C.set_isa(isa)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to compute on, once per CPU instruction set: for tests of numbers."""
    device, isa = request.param
    if device == "emulated":
        # One without tensor cores: persistent kernels have tests of their own.
        with emulated.in_place_of_the_cpu(), emulated.a_gpu(arch=75):
            yield "cpu"
        return
    if isa is not None:
        _C.set_isa(isa)  # put back by _same_start
    with _torch_without_cudnn(device):
        yield device


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to compute on, once: for tests of behaviour."""
    with _torch_without_cudnn(request.param):
        yield request.param


def _torch_without_cudnn(device: str):
    """Through cuDNN torch.nn's layers refuse much (backward in eval mode, double backward, a non-contiguous hx)
    that they allow through torch's own kernels: those are what ours is compared with. Without TF32: it is on for
    recurrent layers unless told, which our kernels obey, and off for the products that torch's kernels are made of."""
    if device == "cpu":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)
