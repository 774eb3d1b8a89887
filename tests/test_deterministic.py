"""torch.use_deterministic_algorithms(True): our layers obey it without a word, and the same call gives the same bits,
however often and however the threads are scheduled."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity import CELLS, KINDS, LAYERS, Kind, assert_equal, leaves, make_twins, pack, run

from fused_rnn import _C

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)

ROOT = Path(__file__).resolve().parent.parent
REPEATS, THREADS = 5, 4
STEPS, BATCH, INPUT, HIDDEN = 12, 21, 40, 48


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("training", [False, True], ids="training={}".format)
def test_more_than_one_thread_works(cell: str, training: bool):
    """At the sizes of the tests below, in float32, on the CPU."""
    plan = _C.cpu_plan(cell, STEPS, BATCH, INPUT, HIDDEN, directions=2, threads=THREADS, training=training)
    assert plan["threads"] == THREADS


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Not only warned of: refused. What torch leaves uninitialised is filled with NaN, so that reading it shows."""
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.use_deterministic_algorithms(False)


def test_cublas_is_set_up_for_it_before_any_product():
    """The variable counts as it was at the first one of the process, which may be that of another test: conftest.py."""
    code = "import os, sys; sys.path.insert(0, 'tests'); import conftest; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    environ = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert found.stdout.strip() in (":4096:8", ":16:8"), found.stderr


def assert_repeats(module, x, hx, **how) -> None:
    torch.set_num_threads(THREADS)  # put back after the test
    torch.manual_seed(0)  # of dropout
    first = run(module, x, hx, **how)
    assert all(value.isfinite().all() for value in first.values())
    for _ in range(REPEATS):
        torch.manual_seed(0)
        assert_equal(run(module, x, hx, **how), first)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_each_time(kind: Kind, dtype: torch.dtype, device: str):
    options = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True, "dropout": 0.3}
    ours = make_twins(kind, INPUT, HIDDEN, dtype=dtype, device=device, **options).ours
    assert_repeats(ours, *leaves(ours, STEPS, BATCH))


@layers
def test_the_same_bits_each_time_packed(kind: Kind, device: str):
    ours = make_twins(kind, INPUT, HIDDEN, device=device, num_layers=2, bidirectional=True).ours
    x, hx = leaves(ours, STEPS, BATCH)
    assert_repeats(ours, x, hx, form=pack([1 + 5 * k % 12 for k in range(BATCH)]))


@kinds
def test_the_same_bits_in_second_order(kind: Kind, device: str):
    """Double backward, in plain PyTorch."""
    ours = make_twins(kind, 10, 12, device=device).ours
    x, hx = leaves(ours, 6, 5)

    def second() -> tuple[torch.Tensor, ...]:
        out = ours(x, hx)
        out = out[0] if isinstance(out, tuple) else out
        first = torch.autograd.grad(out.square().sum(), list(ours.parameters()), create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), [x, *ours.parameters()])

    expected = second()
    for _ in range(REPEATS):
        assert all(map(torch.equal, second(), expected))
