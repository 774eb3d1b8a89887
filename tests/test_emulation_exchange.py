"""The emulation (see test_emulation.py) on kernels whose blocks exchange data while they run: clusters and their shared
memory, asynchronous stores, cooperative launches, flags in global memory; and launches that must be refused.
"""

from __future__ import annotations

import pytest
import torch
from emulation import machines
from emulation.device import Emulated
from emulation.machines import (
    ILLEGAL_ADDRESS,
    INVALID_CONFIGURATION,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    SEEDS,
    TIMEOUT,
    TOO_LARGE,
    Make,
    has,
    needs_compiler,
    ok,
    on_machines,
)

# ---- Clusters ----


@on_machines
@pytest.mark.parametrize("size", [2, 4, 8])
def test_cluster(make: Make, size: int) -> None:
    machine = make()
    if not has(machine, 9):
        pytest.skip("clusters came with sm_90")
    x = torch.randint(-9, 9, (3, size, 64)).float()
    out = machine.upload(torch.zeros_like(x))
    ok(machine, "run_sum_of_cluster", machine.upload(x), out, 3, size, 64, 0)
    assert torch.equal(machine.download(out), x.sum(1, keepdim=True).expand_as(x))


@on_machines
@pytest.mark.parametrize("without_fences", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [2, 4])
def test_ring_of_asynchronous_stores(make: Make, size: int, steps: int, without_fences: bool) -> None:
    machine = make()
    if not has(machine, 9):
        pytest.skip("clusters came with sm_90")
    x = torch.randn(size, 32, 4)
    data = machine.upload(x)
    ok(machine, "run_ring", data, size, 32, steps, int(without_fences))
    assert torch.equal(machine.download(data), x.roll(steps, 0))


@on_machines
def test_stores_into_another_block(make: Make) -> None:
    machine = make()
    if not has(machine, 9):
        pytest.skip("clusters came with sm_90")
    x = torch.randn(4, 64)
    data = machine.upload(x)
    ok(machine, "run_neighbours", data, 4, 64, 0, 0)
    assert torch.equal(machine.download(data), x.roll(1, 0))
    if isinstance(machine, Emulated):
        for after_reads, block_reach in ((0, 1), (1, 0), (1, 1)):
            assert machine.call("run_neighbours", data, 4, 64, after_reads, block_reach) == LAUNCH_FAILURE
            assert "data race" in machine.last_error()


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_mistakes_of_a_cluster(seed: int) -> None:
    emulated = machines.emulated()
    emulated.seed(seed)
    x, out = emulated.upload(torch.zeros(4, 32)), emulated.upload(torch.zeros(4, 32))
    assert (
        emulated.call("run_sum_of_cluster", x, out, 1, 4, 32, 1) == LAUNCH_FAILURE
    )  # reads before the barrier
    assert "data race" in emulated.last_error() or "uninitialised" in emulated.last_error()
    assert emulated.call("run_sum_of_cluster", x, out, 1, 4, 32, 2) == ILLEGAL_ADDRESS
    assert "an exited block's shared memory" in emulated.last_error()


@needs_compiler
def test_a_cluster_of_one_block_has_no_asynchronous_stores() -> None:
    """PTX leaves undefined what they would do there."""
    emulated = machines.emulated()
    data = emulated.upload(torch.zeros(1, 32, 4))
    assert emulated.call("run_ring", data, 1, 32, 2, 0) == LAUNCH_FAILURE
    assert "st.async in a cluster of one block" in emulated.last_error()


RING_MISTAKES = {
    "no guard": (LAUNCH_FAILURE, "race"),
    "reach of a block": (LAUNCH_FAILURE, "what an asynchronous store or copy wrote"),
    "no wait": (LAUNCH_FAILURE, ""),
    "wrong parity": (LAUNCH_FAILURE, ""),
    "few bytes": (LAUNCH_FAILURE, ""),
    "leaves early": (ILLEGAL_ADDRESS, "exited"),
    "never sends": (TIMEOUT, "wait at the end of a phase of parity 1 of the mbarrier at shared byte 0"),
    "arrives twice": (None, ""),
}


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", RING_MISTAKES)
def test_mistakes_of_a_ring(mistake: str, seed: int) -> None:
    emulated = machines.emulated()
    error, words = RING_MISTAKES[mistake]
    emulated.seed(seed)
    number = list(RING_MISTAKES).index(mistake) + 2
    found = emulated.call("run_ring", emulated.upload(torch.zeros(4, 32, 4)), 4, 32, 8, number)
    if error is None:  # the phase that was not meant is over, or has more arrivals than it expects
        assert found in (TIMEOUT, LAUNCH_FAILURE), emulated.last_error()
    else:
        assert found == error, emulated.last_error()
    assert words in emulated.last_error()


# ---- Grids ----


@on_machines
def test_exchange_by_data_as_flag(make: Make) -> None:
    """Two launches on the same buffers, whose epochs go on."""
    machine = make()
    x = torch.randint(-3, 4, (5, 32, 3)).float()
    data, packets = machine.upload(x), machine.upload(torch.zeros(3, 5, 32, 4))
    for launch in range(2):
        ok(machine, "run_exchange", data, packets, 5, 32, 4, 1 + 4 * launch)
    assert torch.equal(machine.download(data), (x.sum(0) * 5.0**7).expand_as(x))


BROADCASTS = {
    "none": 0,
    "relaxed store": LAUNCH_FAILURE,
    "relaxed load": LAUNCH_FAILURE,
    "no barrier": LAUNCH_FAILURE,
    "fences": 0,
    "fence of a block": LAUNCH_FAILURE,
    "volatile": LAUNCH_FAILURE,
    "not cooperative": TIMEOUT,
}


@needs_compiler
@pytest.mark.parametrize("mistake", BROADCASTS)
def test_flags_between_blocks(mistake: str) -> None:
    emulated = machines.emulated()
    x = torch.randn(64)
    for seed in SEEDS:
        emulated.seed(seed)
        flag, kept = emulated.upload(torch.zeros(1, dtype=torch.int32)), emulated.upload(torch.zeros(64))
        out = emulated.upload(torch.zeros(3, 64))
        number = list(BROADCASTS).index(mistake)
        found = emulated.call("run_broadcast", emulated.upload(x), kept, flag, out, 4, 64, number)
        if mistake == "not cooperative" and found == 0:
            continue  # block 0 happened to come first
        assert found == BROADCASTS[mistake], emulated.last_error()
        if found == 0:
            assert torch.equal(emulated.download(out), x.expand(3, 64))


@pytest.mark.cuda
def test_flags_between_blocks_on_a_gpu() -> None:
    gpu = machines.gpu()
    x = torch.randn(64)
    for number in (0, list(BROADCASTS).index("fences")):
        flag, kept = gpu.upload(torch.zeros(1, dtype=torch.int32)), gpu.upload(torch.zeros(64))
        out = gpu.upload(torch.zeros(3, 64))
        ok(gpu, "run_broadcast", gpu.upload(x), kept, flag, out, 4, 64, number)
        assert torch.equal(gpu.download(out), x.expand(3, 64))


@on_machines
def test_fences_around_atomics(make: Make) -> None:
    machine = make()

    def last_block(with_fence: int) -> tuple[int, float]:
        partial, out = machine.upload(torch.zeros(20)), machine.upload(torch.zeros(1))
        count = machine.upload(torch.zeros(1, dtype=torch.int32))
        error = machine.call("run_last_block", partial, count, out, 20, with_fence)
        return error, machine.download(out).item()

    assert last_block(1) == (0, 210.0)
    if isinstance(machine, Emulated):
        assert last_block(0)[0] == LAUNCH_FAILURE
        assert "data race" in machine.last_error()


@needs_compiler
def test_launches_that_do_not_fit() -> None:
    emulated = machines.emulated()
    emulated.library.frnn_emulation_set_multiprocessors(2)
    data, packets = emulated.upload(torch.zeros(5, 1024, 3)), emulated.upload(torch.zeros(3, 5, 1024, 4))
    assert emulated.call("run_exchange", data, packets, 5, 1024, 1, 1) == TOO_LARGE
    assert "5 blocks, where 4 can run at once" in emulated.last_error()
    assert emulated.call("run_exchange", data, packets, 4, 1024, 1, 1) == 0
    x = emulated.upload(torch.zeros(2**16))
    assert emulated.call("run_reverse", x, x, 1025, 1) == INVALID_CONFIGURATION
    assert emulated.call("run_reverse", x, x, 64, 0) == INVALID_CONFIGURATION
    assert emulated.call("run_sum_of_cluster", x, x, 1, 16, 32, 0) == 0
    assert emulated.call("run_sum_of_cluster", x, x, 1, 17, 32, 0) == INVALID_CONFIGURATION
    assert emulated.call("run_shared_bytes", 48 << 10, 0) == 0
    assert emulated.call("run_shared_bytes", (48 << 10) + 1, 0) == INVALID_VALUE
    assert emulated.call("run_shared_bytes", 227 << 10, 1) == 0
    assert emulated.call("run_shared_bytes", (227 << 10) + 1, 1) == INVALID_VALUE
