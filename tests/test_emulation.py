"""The emulation of CUDA's execution model (tests/emulation) on kernels of its own: right ones compute what they should
under every schedule, and each mistake that it is there to find is found. On a machine with a GPU the right ones run
there too, which shows that the emulation and csrc/cuda/ptx.cuh mean the same. Here: one block at a time. Blocks that
exchange data: test_emulation_exchange.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import build, machines
from emulation.device import Emulated
from emulation.machines import (
    ILLEGAL_ADDRESS,
    KERNELS,
    LAUNCH_FAILURE,
    MISALIGNED,
    SEEDS,
    TIMEOUT,
    Make,
    has,
    needs_compiler,
    ok,
    on_machines,
)
from test_build import tools

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


# ---- Blocks ----


@on_machines
def test_barrier(make: Make) -> None:
    machine = make()
    x = torch.randn(5, 96)
    out = machine.upload(torch.zeros_like(x))
    ok(machine, "run_reverse", machine.upload(x), out, 96, 5)
    assert torch.equal(machine.download(out), x.flip(1))
    data = machine.upload(x[0])
    ok(machine, "run_rotate", data, 96, 7)
    assert torch.equal(machine.download(data), x[0].roll(-7))


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_noticed(seed: int) -> None:
    broken = machines.broken("WITHOUT_BARRIER", seed)
    x = torch.randn(64)
    assert broken.call("run_reverse", broken.upload(x), broken.upload(x), 64, 1) == LAUNCH_FAILURE
    assert "uninitialised: block (0,0,0) thread" in broken.last_error()
    assert "reads at " in broken.last_error()
    assert "blocks.cu:" in broken.last_error()


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [2, 64])
def test_a_missing_barrier_before_a_write_is_noticed(seed: int, threads: int) -> None:
    """What one thread reads another overwrites. With two threads most schedules give the right result by chance."""
    broken = machines.broken("WITHOUT_SECOND_BARRIER", seed)
    assert broken.call("run_rotate", broken.upload(torch.randn(threads)), threads, 3) == LAUNCH_FAILURE
    assert "data race" in broken.last_error()
    assert "of the shared memory of block 0" in broken.last_error()


@on_machines
def test_shuffles_votes_and_atomics(make: Make) -> None:
    machine = make()
    x = torch.randint(-8, 9, (6, 1000)).bfloat16()
    out, done = machine.upload(torch.zeros(6)), machine.upload(torch.zeros(1, dtype=torch.int32))
    ok(machine, "run_sum", machine.upload(x), out, done, 1000, 6, 128)
    assert torch.equal(machine.download(out), x.float().sum(1))
    assert machine.download(done).item() == 6
    for low in (0, 1):
        x = torch.randint(low, 9, (256,), dtype=torch.int32)
        out, positive = machine.upload(torch.zeros_like(x)), machine.upload(torch.zeros(1, dtype=torch.int32))
        ok(machine, "run_scan", machine.upload(x), out, positive, 256)
        assert torch.equal(machine.download(out), x.cumsum(0).int())
        assert machine.download(positive).item() == low


@on_machines
def test_16_bit_types_round_as_torch_does(make: Make) -> None:
    machine = make()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    half, bfloat = bits.view(torch.float16), bits.view(torch.bfloat16)
    outs = [machine.upload(torch.zeros(2**16)) for _ in range(2)]
    ok(machine, "run_from_half", machine.upload(half), machine.upload(bfloat), *outs, 256)
    for out, wanted in zip(outs, (half, bfloat), strict=True):
        same = machine.download(out).view(torch.int32) == wanted.float().view(torch.int32)
        assert (same | wanted.isnan()).all()
        assert torch.equal(machine.download(out).isnan(), wanted.isnan())
    floats = torch.randint(-(2**31), 2**31, (2**14,), dtype=torch.int32).view(torch.float32)
    ties = torch.cat(
        [(half.float() + half.float().roll(1)) / 2, (bfloat.float() + bfloat.float().roll(1)) / 2]
    )
    x = torch.cat([floats, ties, torch.tensor([65519.0, 65520.0, 2**-24, 2**-25, -(2**-25)])])
    x = torch.cat([x, torch.zeros(-len(x) % 256)])
    outs = [machine.upload(torch.zeros(len(x), dtype=dtype)) for dtype in (torch.float16, torch.bfloat16)]
    ok(machine, "run_to_half", machine.upload(x), *outs, len(x) // 256)
    for out, dtype in zip(outs, (torch.float16, torch.bfloat16), strict=True):
        torch.testing.assert_close(machine.download(out), x.to(dtype), rtol=0, atol=0, equal_nan=True)


MISTAKES = {
    "none": (0, []),
    "reads after the end": (
        ILLEGAL_ADDRESS,
        ["out of bounds: reads 4 bytes", "0 bytes after the end", "of 256 bytes"],
    ),
    "writes before": (
        ILLEGAL_ADDRESS,
        ["out of bounds: writes 4 bytes", "4 bytes before the start", "thread (3,0,0)"],
    ),
    "host memory": (ILLEGAL_ADDRESS, ["not device memory"]),
    "shared after the end": (
        ILLEGAL_ADDRESS,
        ["byte 256 of its own block's shared memory, which has 256 bytes"],
    ),
    "others' stack": (ILLEGAL_ADDRESS, ["not device memory"]),
    "same value": (LAUNCH_FAILURE, ["data race", "global memory, at byte 0 of an allocation of 256 bytes"]),
    "bytes of a word": (LAUNCH_FAILURE, ["data race", "thread (0,0,0)", "thread (1,0,0)"]),
    "barrier in a branch": (
        TIMEOUT,
        ["deadlock", "threads 0-31 wait at barrier 1", "threads 32-63 have finished"],
    ),
    "missing lane": (
        TIMEOUT,
        ["deadlock", "threads 0-4, 6-31 wait at __syncwarp", "threads 5 wait at a shuffle"],
    ),
    "shuffle orders": (LAUNCH_FAILURE, ["data race", "thread (0,0,0)", "thread (1,0,0)"]),
    "spins for ever": (TIMEOUT, ["deadlock", "threads 0 look again and again at memory that nobody writes"]),
    "loops for ever": (TIMEOUT, ["deadlock", "thread (0,0,0) is in a loop that touches no memory"]),
    "plain flag": (LAUNCH_FAILURE, ["data race", "thread (33,0,0)"]),
    "uninitialised": (LAUNCH_FAILURE, ["uninitialised", "of the shared memory of block 0"]),
}


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_block(mistake: str) -> None:
    emulated = machines.emulated()
    error, words = MISTAKES[mistake]
    elsewhere = torch.zeros(1) if mistake == "host memory" else emulated.upload(torch.zeros(1))
    data = emulated.upload(torch.zeros(64))
    for seed in SEEDS if mistake != "loops for ever" else [0]:
        emulated.seed(seed)
        found = emulated.call("run_mistaken", list(MISTAKES).index(mistake), data, 64, elsewhere, 64)
        assert found == error, emulated.last_error()
        for word in words:
            assert word in emulated.last_error()


@needs_compiler
@pytest.mark.parametrize("bytes_", [8, 16])
def test_misaligned_vectors(bytes_: int) -> None:
    emulated = machines.emulated()
    x = emulated.upload(torch.arange(64.0))
    out = emulated.upload(torch.zeros(64))
    count = 64 * 4 // bytes_ - 1
    ok(emulated, f"run_copy_{bytes_}", x, out, count)
    assert torch.equal(
        emulated.download(out)[: count * bytes_ // 4], torch.arange(64.0)[: count * bytes_ // 4]
    )
    for offset in (4, bytes_ // 2):
        assert emulated.call(f"run_copy_{bytes_}", x.at(offset), out, count) == MISALIGNED
        assert emulated.call(f"run_copy_{bytes_}", x, out.at(offset), count) == MISALIGNED
        assert f"at a multiple of {bytes_} bytes" in emulated.last_error()
    ok(emulated, f"run_copy_{bytes_}", x.at(bytes_), out, count)


@needs_compiler
def test_freed_memory_stays_away() -> None:
    emulated = machines.emulated()
    gone = emulated.upload(torch.zeros(64))
    address = gone.at(0)
    del gone
    assert emulated.call("run_rotate", address, 64, 1) == ILLEGAL_ADDRESS
    assert "that was freed" in emulated.last_error()


# ---- Schedules ----


@needs_compiler
def test_a_seed_is_a_schedule() -> None:
    emulated = machines.emulated()

    def schedule(seed: int) -> int:
        emulated.seed(seed)
        ok(emulated, "run_rotate", emulated.upload(torch.zeros(96)), 96, 3)
        return emulated.schedule()

    assert len({schedule(seed) for seed in range(10)}) == 10
    assert schedule(3) == schedule(3)
    emulated.library.frnn_emulation_set_yield_probability(0.5)
    often = schedule(3)
    emulated.library.frnn_emulation_set_yield_probability(0.02)
    assert often != schedule(3)


# ---- Matrices, copies, named barriers ----


@on_machines
@pytest.mark.parametrize("kind", ["bf16", "f16", "f16 k8", "tf32"])
def test_matrix_products(make: Make, kind: str) -> None:
    machine = make()
    if kind != "f16 k8" and not has(machine, 8):
        pytest.skip("sm_75 has f16 m16n8k8 only")
    depth = 16 if kind in ("bf16", "f16") else 8
    dtype = {"bf16": torch.bfloat16, "tf32": torch.float32}.get(kind, torch.float16)
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype), torch.randn(16, 8)
    number = ["bf16", "f16", "f16 k8", "tf32"].index(kind)
    wanted = c.double() + _as_multiplied(a) @ _as_multiplied(b).T

    def product(swapped: int) -> torch.Tensor:
        out = machine.upload(c)
        ok(machine, "run_product", number, machine.upload(a), machine.upload(b), out, swapped, 32)
        return machine.download(out).double()

    torch.testing.assert_close(product(0), wanted, rtol=1e-5, atol=1e-5)
    if kind != "tf32":
        assert (product(1) - wanted).abs().max() > 0.1


def _as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """A float as the tensor core sees it: rounded to 10 bits behind the point, ties away from zero."""
    if x.dtype == torch.float32:
        x = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x.double()


@needs_compiler
def test_a_matrix_product_needs_a_whole_warp() -> None:
    emulated = machines.emulated()
    zeros = [emulated.upload(torch.zeros(256)) for _ in range(3)]
    assert emulated.call("run_product", 0, *zeros, 0, 16) == LAUNCH_FAILURE
    assert "all 32 lanes" in emulated.last_error()


@on_machines
@pytest.mark.parametrize("transpose", [False, True])
def test_matrices_from_shared_memory(make: Make, transpose: bool) -> None:
    machine = make()
    x = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = machine.upload(torch.zeros_like(x))
    ok(machine, "run_matrices", machine.upload(x), out, int(transpose))
    assert torch.equal(machine.download(out), x.mT if transpose else x)


@on_machines
def test_copies_that_arrive_later(make: Make) -> None:
    machine = make()
    x = torch.randn(9, 64, 4)
    out = machine.upload(torch.zeros_like(x))
    ok(machine, "run_copies", machine.upload(x), out, 9, 64, 0)
    assert torch.equal(machine.download(out), x.roll(-1, 1))


@needs_compiler
@pytest.mark.parametrize("mistake", [1, 2])
def test_mistakes_with_copies(mistake: int) -> None:
    """1: nothing waits for the copies; 2: no barrier between the wait and the others' reads."""
    emulated = machines.emulated()
    x = emulated.upload(torch.zeros(9, 64, 4))
    for seed in SEEDS:
        emulated.seed(seed)
        assert (
            emulated.call("run_copies", x, emulated.upload(torch.zeros(9, 64, 4)), 9, 64, mistake)
            == LAUNCH_FAILURE
        )
        assert "data race" in emulated.last_error() or "uninitialised" in emulated.last_error()


@on_machines
def test_named_barriers(make: Make) -> None:
    machine = make()
    x = torch.randn(6, 32)
    out = machine.upload(torch.zeros_like(x))
    ok(machine, "run_hand_over", machine.upload(x), out, 6, 0)
    assert torch.equal(machine.download(out), x.flip(1))
    if isinstance(machine, Emulated):
        assert machine.call("run_hand_over", machine.upload(x), out, 6, 1) == LAUNCH_FAILURE
        assert "data race" in machine.last_error() or "uninitialised" in machine.last_error()


# ---- Real CUDA ----


needs_nvcc = pytest.mark.skipif(tools.find_toolkit(os.environ) is None, reason="needs nvcc")


@needs_nvcc
def test_nvcc_is_found_where_the_build_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    home = tools.find_toolkit(os.environ).home
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done = subprocess.run([machines.nvcc(), "--version"], check=True, capture_output=True, text=True)
    assert "Cuda compilation tools" in done.stdout


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_nvcc_takes_the_same_sources(path: Path, tmp_path: Path) -> None:
    """Every instruction of ptx.cuh assembles for every architecture that nvcc has, or traps where it is missing."""
    listed = subprocess.run([machines.nvcc(), "--list-gpu-code"], check=True, capture_output=True, text=True)
    archs = [arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" in listed.stdout.split()]
    command = [
        machines.nvcc(),
        "-std=c++17",
        "-O3",
        f"-I{build.CSRC}",
        "-Werror=all-warnings",
        "-c",
        str(path),
    ]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
