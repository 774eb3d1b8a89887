"""The CPU kernels in the company of other threads and processes: one thread, nested regions, DataLoader workers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading

import pytest
import torch
from test_ops import CELLS, make_layer
from torch import Tensor

import fused_rnn
from fused_rnn import ops

REGION = """
void in_parallel(void (*callback)(void)) {
#pragma omp parallel num_threads(2)
  callback();
}
"""


@pytest.fixture(scope="module")
def in_parallel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A parallel region as at::parallel_for opens it, on torch's own OpenMP runtime."""
    folder = tmp_path_factory.mktemp("region")
    (folder / "region.c").write_text(REGION)
    library = folder / "libregion.so"
    command = ["c++", "-x", "c", "-fopenmp", "-shared", "-fPIC", folder / "region.c", "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("cell", CELLS)
def test_inside_a_parallel_region(cell: str, in_parallel: ctypes.CDLL) -> None:
    """A team inside a team would get no threads, and its members would wait for each other for ever."""
    arguments = make_layer(cell, 9, 3, 16, 300, dtype=torch.float32)  # units over threads, a barrier a step
    torch.set_num_threads(2)
    expected = ops.layer_forward(cell, *arguments, False)[0]
    found: dict[int, Tensor] = {}

    def work() -> None:
        found[threading.get_ident()] = ops.layer_forward(cell, *arguments, False)[0]

    in_parallel.in_parallel(ctypes.CFUNCTYPE(None)(work))
    assert len(found) == 2
    assert all(torch.equal(output, expected) for output in found.values())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_python_threads_may_train_at_once(cell: str) -> None:
    """Each with modules and gradients of its own, while others call cells."""
    torch.set_num_threads(2)
    module = fused_rnn.LSTMCell(24, 96)
    x = torch.randn(2, 24)
    with torch.no_grad():
        h = module(x)[0]
    arguments = make_layer(cell, 12, 20, 24, 96, dtype=torch.float32)
    output, hn, _, saved = ops.layer_forward(cell, *arguments, True)
    needs = sum(1 << k for k, a in enumerate([arguments[0], *arguments[2:]]) if a is not None)
    ones = [torch.ones_like(output), torch.ones_like(hn), None]
    expected = ops.layer_backward(cell, *ones, *arguments, output, saved, needs)
    wrong: list[str] = []

    def train() -> None:
        for _ in range(5):
            found = ops.layer_backward(cell, *ones, *arguments, output, saved, needs)
            pairs = zip(found, expected, strict=True)
            if not all(torch.equal(a, b) for a, b in pairs if b is not None):
                wrong.append("gradients")

    @torch.no_grad()
    def serve() -> None:
        for _ in range(200):
            if not torch.equal(module(x)[0], h):
                wrong.append("cell")

    workers = [threading.Thread(target=f) for f in (train, serve, train, serve)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers), "a call hangs"
    assert not wrong


def test_one_thread_is_obeyed() -> None:
    """set_num_threads(1), as servers say it: no other thread of the process computes."""
    code = """
import os, torch, fused_rnn
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
layer, cell = fused_rnn.LSTM(64, 256, bidirectional=True), fused_rnn.GRUCell(64, 256)
with torch.inference_mode():
    layer(torch.randn(30, 16, 64)), cell(torch.randn(64, 64))
layer(torch.randn(30, 16, 64))[0].sum()
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_dataloader_workers_after_use() -> None:
    """Workers are forked from a process whose threads have been used, and torch gives each one thread."""
    code = """
import torch, fused_rnn
torch.set_num_threads(2)
layer, cell = fused_rnn.LSTM(64, 300), fused_rnn.GRUCell(64, 128)
x = torch.randn(4, 30, 8, 64)
layer(x[0])[0].sum().backward()
def embed(k):
    with torch.no_grad():
        return layer(x[k])[0], cell(x[k, 0])
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        return embed(k)
expected = [embed(k) for k in range(4)]
loader = torch.utils.data.DataLoader(
    Data(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
for found, wanted in zip(loader, expected, strict=True):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
layer(x[0])[0].sum().backward()  # the parent goes on as before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@torch.no_grad()
def test_a_cell_leaves_the_flushing_of_denormals_as_it_was() -> None:
    tiny = torch.tensor([1e-40])
    cell = fused_rnn.RNNCell(1, 1, nonlinearity="relu")
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            kept = (tiny * 1).item() != 0
            cell(torch.ones(1, 1))
            assert kept == ((tiny * 1).item() != 0) == (not flush)
        finally:
            torch.set_flush_denormal(False)
