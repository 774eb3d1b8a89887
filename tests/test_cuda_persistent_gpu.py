"""The persistent CUDA strategies on a GPU, where a wait that never ends, a launch that does not fit or a missing fence
shows: numbers at the edges of every strategy, NaN, repeats, CUDA graphs, streams, and a soak test. Tests of numbers run
in small shapes on emulated kernels too. The reset mask is in test_cuda_persistent_scan.py: no operator takes it yet."""

from __future__ import annotations

import itertools
from collections import Counter

import persistent_checks
import pytest
import torch
from parity import GRU, LSTM, RNN, RNN_RELU, leaves, make_twins, pack, run, upcast
from persistent_checks import (
    EMULATED,
    GPU,
    TIERS,
    Place,
    both_passes,
    check,
    places,
    places_and_numbers,
    reach,
    same_bits,
)
from test_cuda import captured, cloned, launches, outputs, redraw
from test_cuda_persistent_scan import (
    EPS,
    NUMBERS,
    TF32,
    as_good_as_steps,
    errors,
    gradients_like,
    problem,
    rounding,
    use,
)
from test_cuda_small import draw_twins, run_on
from test_ops import CELLS, wanted_bits
from torch.profiler import ProfilerActivity, profile

from fused_rnn import _C, ops, reference

KINDS = (RNN, RNN_RELU, GRU, LSTM)
STEPS = {"step", "step_fused"}
CYCLES = 30_000_000  # of a kernel that only waits: some hundredths of a second

tiers = pytest.mark.parametrize("tier", TIERS)
cells = pytest.mark.parametrize("cell", CELLS)
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
every_numbers = pytest.mark.parametrize("numbers", NUMBERS)


@pytest.fixture(autouse=True)
def _threads() -> None:
    """For the reference on the CPU."""
    if torch.cuda.is_available():
        torch.set_num_threads(4)


# ---------------------------------------------------------------------------------------------------- numbers

# H in parts of what the strategy reaches, and B: one row, a full tile of 8, one more, and many tiles. The largest are
# the GPU's alone.
EDGES = [(0, 1), (0, 65), (0.3, 8), (0.51, 9), (0.51, 65), (1, 9), (1, 65)]


@pytest.mark.cuda
@pytest.mark.parametrize("part, B", EDGES)
@tiers
@every_numbers
@cells
def test_numbers_at_the_edges(cell, numbers, tier, part, B):
    H = max(1, round(part * reach(tier, NUMBERS[numbers])))
    check_numbers(GPU, cell, numbers, tier, *((3, 1) if part == 1 else (5, 2)), B, H)


@pytest.mark.parametrize("numbers, B, H", [("tf32", 1, 1), ("fp32", 9, 33), ("bf16", 9, 33)])
@tiers
@cells
def test_numbers_of_emulated_kernels(cell, tier, numbers, B, H):
    check_numbers(EMULATED, cell, numbers, tier, 3, 2, B, H)


def check_numbers(place: Place, cell, numbers, tier, T, directions, B, H):
    with place.open(numbers):
        dtype, packed = NUMBERS[numbers], B in (9, 65)
        arguments = problem(cell, T, B, 5, H, directions=directions, packed=packed, dtype=dtype)
        ran = check(place, cell, arguments, tier)
    no_cluster = tier == "cluster" and place is GPU and torch.cuda.get_device_capability() < (9, 0)
    assert set(ran) <= {tier, *STEPS}
    # Others may have a pass that does not fit this GPU, and steps take its place.
    if H == 1:
        assert (tier not in ran) if no_cluster else ran == (tier, tier), "what it reaches, it runs"


@places_and_numbers("bf16", "tf32")
@tiers
@kinds
def test_a_module_trains(kind, numbers, tier, place: Place):
    """Two layers, both directions, packed and padded, a forward pass and a backward pass."""
    dtype, tf32 = NUMBERS[numbers], numbers == "tf32"
    steps, *sizes = (3, 4, 10) if place is EMULATED else (5, 40, min(100, reach(tier, dtype)))
    low = torch.bfloat16 if tf32 else dtype
    share = TF32 / EPS[low] if tf32 else 1.0
    twins = draw_twins(kind, 0, *sizes, dtype=low, num_layers=2, bidirectional=True)
    x, hx = leaves(twins.ours, steps, 9)
    if kind is RNN_RELU:
        x = x.detach().abs().requires_grad_()
    for how in ({}, {"form": pack([steps, 2, 3, 1, steps, 3, 1, 2, steps])}):
        wanted = list(run(twins.exact, upcast(x), upcast(hx), **how).values())
        with place.open(numbers):
            with place.forced("step"):
                theirs = errors(list(run_on(place.device, twins.ours, x, hx, **how).values()), wanted)
            ours = twins.ours.float() if tf32 else twins.ours
            leaf, states = (widened(x), widened(hx)) if tf32 else (x, hx)
            with place.forced(tier):
                found = errors(list(run_on(place.device, ours, leaf, states, **how).values()), wanted)
            twins.ours.to(low)
            as_good_as_steps(found, [share * error for error in theirs], rounding(dtype))


def widened(value):
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.detach().float().requires_grad_()


@places_and_numbers("bf16", "tf32", "fp32")
@tiers
@cells
def test_nan_and_infinity_stay_in_their_row(cell, numbers, tier, place: Place):
    """Row 2 gets a NaN at step 1, row 5 an infinity at step 0: what the other rows get is the same, bit for bit, and in
    these both are where they are in torch."""
    dtype = NUMBERS[numbers]
    with place.open(numbers):
        H = 40 if place is EMULATED else reach(tier, dtype) // 2 + 3
        arguments = problem(cell, 4, 9, 5, H, directions=1, dtype=dtype)
        gradients, _ = gradients_like(cell, arguments, dtype)
        clean = both_passes(place, cell, arguments, gradients, tier, tier)
        arguments[0][1, 2, 0] = float("nan")
        arguments[0][0, 5, 0] = float("inf")
        found = both_passes(place, cell, arguments, gradients, tier, tier)
    others = [b for b in range(9) if b not in (2, 5)]
    for k in (0, 1, 3):  # output, h_n, the gradient of the input
        assert torch.equal(found[k][:, others], clean[k][:, others])
    assert torch.equal(found[0][0, 2], clean[0][0, 2]), "before the NaN"
    assert found[0][1:, 2].isnan().all() and found[1][:, 2].isnan().all()
    assert not torch.equal(found[0][:, 5], clean[0][:, 5])
    for ours, exact in zip(found[:3], reference.layer(cell, *upcast(arguments)), strict=True):
        if ours is not None:
            assert torch.equal(ours.isnan(), exact.isnan()) and torch.equal(ours.isinf(), exact.isinf())


@places
@tiers
@cells
def test_the_same_bits_every_time(cell, tier, place: Place):
    """With other numbers between them, which what is left in the exchange's memory comes from."""
    with place.open():
        H, rounds = (40, 2) if place is EMULATED else (reach(tier, torch.float16), 20)
        arguments = problem(cell, 6, 9, 5, H, directions=1, packed=True, dtype=torch.float16)
        other = problem(cell, 5, 9, 5, H, directions=1, dtype=torch.float16)
        gradients, _ = gradients_like(cell, arguments, torch.float16)
        others, _ = gradients_like(cell, other, torch.float16)
        first = both_passes(place, cell, arguments, gradients, tier, tier)
        for _ in range(rounds):
            both_passes(place, cell, other, others, tier, tier)
            assert same_bits(both_passes(place, cell, arguments, gradients, tier, tier), first)


# ---------------------------------------------------------------------------------------------------- what runs


@pytest.mark.cuda
@tiers
@every_numbers
@cells
def test_what_the_plan_says_is_launched(cell, numbers, tier):
    """Up to the largest hidden size. A plan that the GPU then refuses would run step kernels, right and unseen."""
    calls, planned = [], Counter()
    dtype = NUMBERS[numbers]
    with GPU.open(numbers):
        for part, B in ((0, 1), (0.51, 9), (1, 9), (1, 65)):
            H = max(1, round(part * reach(tier, dtype)))
            arguments = problem(cell, 3, B, 5, H, directions=1, dtype=dtype)
            planned.update(zip(("forward", "backward"), GPU.plan(tier, cell, arguments, dtype), strict=True))
            gradients, _ = gradients_like(cell, arguments, dtype)
            calls.append((arguments, gradients))
        _, on_gpu = launches(lambda: [both_passes(GPU, cell, *call, tier, tier) for call in calls])
    ran = {
        (p, tier): sum(f"persistent_{p}_kernel" in name for name in on_gpu) for p in ("forward", "backward")
    }
    assert ran == {key: planned[key] for key in ran}


# ---------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.cuda
@tiers
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_graph_replayed_with_other_numbers(kind, dtype, tier):
    """A training step, between replays the same eagerly: what one launch leaves in the exchange's memory is no sign to
    the next."""
    with GPU.open(), GPU.forced(tier):
        module = make_twins(kind, 12, reach(tier, dtype) // 2 + 3, dtype=dtype, device="cuda").ours
        x, hx = leaves(module, 6, 9)
        replay = captured(lambda: run(module, x, hx))
        for changed in ([], [x], [x], list(module.parameters()), [], [x]):
            redraw(*changed)
            again = [replay() for _ in range(3)]
            eager = cloned(run(module, x, hx))
            GPU.finish(f"a graph of {kind} by {tier}")
            for values in again:
                assert same_bits(list(values.values()), list(eager.values()))


# ---------------------------------------------------------------------------------------------------- streams


@pytest.mark.cuda
@tiers
@pytest.mark.parametrize("kind", [GRU, LSTM], ids=str)
def test_beside_a_stream_that_is_busy(kind, tier):
    """Matrix products take the multiprocessors that the blocks of a layer wait for, and give them back."""
    with GPU.open(), GPU.forced(tier):
        module = make_twins(kind, 12, reach(tier, torch.bfloat16), dtype=torch.bfloat16, device="cuda").ours
        x, hx = leaves(module, 50, 16)
        expected = list(run(module, x, hx).values())
        a = torch.randn(4096, 4096, device="cuda")
        busy, side = torch.cuda.Stream(), torch.cuda.Stream()
        GPU.finish(f"{kind} by {tier}")
        found = []
        for _ in range(10):
            with torch.cuda.stream(busy):
                for _ in range(5):
                    a @ a
            with torch.cuda.stream(side):
                found.append(list(run(module, x, hx).values()))
        for stream in (side, busy):
            with torch.cuda.stream(stream):
                GPU.finish(f"{kind} by {tier} beside matrix products")
        assert all(same_bits(values, expected) for values in found)


@pytest.mark.cuda
@pytest.mark.parametrize("pair", [*itertools.combinations_with_replacement(TIERS, 2)], ids="-".join)
def test_two_streams_of_persistent_kernels(pair):
    """Each may want most of the GPU, waits inside for its own blocks, and may get only some of them at first."""
    with GPU.open():
        calls = []
        for seed, tier in enumerate(pair):
            H = reach(tier, torch.bfloat16)
            module = make_twins(LSTM, 12, H, dtype=torch.bfloat16, device="cuda", seed=seed).ours
            x, hx = leaves(module, 100, 16)
            with GPU.forced(tier):
                expected = outputs(module, x, hx)
            calls.append((tier, module, x, hx, expected, torch.cuda.Stream(), []))
        GPU.finish(f"LSTM by {pair}")
        for *_, stream, _ in calls:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
        for _ in range(20):
            for tier, module, x, hx, _, stream, found in calls:
                with GPU.forced(tier), torch.cuda.stream(stream):
                    found.append(outputs(module, x, hx))
        for *_, stream, _ in calls:
            with torch.cuda.stream(stream):
                GPU.finish(f"LSTM by {pair} on two streams")
    for *_, expected, _, found in calls:
        assert all(same_bits(list(f.values()), list(expected.values())) for f in found)
        assert not any(value.isnan().any() for value in expected.values())


# ---------------------------------------------------------------------------------------------------- first use

WARNING = "fused_rnn: on its first use"


def unforced(cell: str, H: int):
    """A layer of a hidden size that no other test has, so that its first use is here; and both of its passes."""
    inputs = GPU.put(problem(cell, 60, 9, 5, H, directions=2, dtype=torch.bfloat16))

    def call() -> list[torch.Tensor | None]:
        output, hn, cn, saved = ops.layer_forward(cell, *inputs, True)
        gradients = [torch.ones_like(output), None, None]
        found = ops.layer_backward(cell, *gradients, *inputs, output, saved, wanted_bits(inputs))
        return [output, hn, cn, *found]

    plan = _C.plan(cell=cell, dtype="bf16", T=60, B=9, I=5, H=H, directions=2, training=True)
    return call, [plan["strategy"], plan["backward_strategy"]]


@pytest.mark.cuda
@pytest.mark.parametrize("H", [93, 237, 541])
@cells
def test_a_kernel_that_agrees_is_what_runs(cell, H, capfd):
    """The first call launches step kernels too, to check; the second none. What runs is what force_plan gives."""
    with GPU.open():
        call, strategies = unforced(cell, H)
        if not set(strategies) <= set(TIERS):
            pytest.skip(f"this GPU runs it by {strategies}")
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            first = call()
            GPU.finish(f"the check of {cell}")
        checked = [event.name for event in profiler.events() if "frnn::" in event.name]
        _, on_gpu = launches(call)
        with GPU.forced("persistent"):
            expected = call()
        assert WARNING not in capfd.readouterr().err
        assert any("step_" in name for name in checked) and any("persistent_" in name for name in checked)
        ran = [name for name in on_gpu if "frnn::" in name]
        assert ran and all("persistent_" in name for name in ran)
        assert same_bits(first, expected)


@pytest.mark.cuda
@cells
def test_nothing_is_checked_while_a_graph_is_captured(cell):
    """Steps are captured; the first call afterwards checks, and persistent kernels run."""
    with GPU.open():
        call, strategies = unforced(cell, 101)
        with GPU.forced("step"):
            steps = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        graph.replay()
        GPU.finish(f"a graph of {cell}")
        assert same_bits(found, steps)
        call()
        _, on_gpu = launches(call)
    assert any("persistent_" in name for name in on_gpu) == bool(set(strategies) & set(TIERS))


# ---------------------------------------------------------------------------------------------------- soak

# What a strategy may differ from the step kernels by, in roundings of the largest number. Emulated, 230 rounds of
# smaller shapes differed by 0.8 at most.
ROUNDINGS = 4


def soak(place: Place, rounds: int, largest: float, seed: int) -> None:
    """Random cells, dtypes, shapes, forms and strategies, forward and backward: two launches a round or more, on one of
    three streams, which are waited for every fifty rounds only."""
    draw = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=draw))

    streams = [torch.cuda.Stream() for _ in range(3)] if place is GPU else []
    pending: list[tuple[str, torch.Tensor]] = []
    strategies: Counter[str] = Counter()
    for count in range(1, rounds + 1):
        cell, numbers, tier = CELLS[below(4)], [*NUMBERS][below(4)], TIERS[below(3)]
        dtype = use(numbers)
        H = 16 + below(max(1, round(largest * reach(tier, dtype)) - 16))
        T, B, directions = 1 + below(12), 1 + below(40), 1 + below(2)
        packed = bool(below(2))
        what = f"round {count}: {cell} {numbers} by {tier}, T {T}, B {B}, H {H}, {directions} ways, packed {packed}"
        with torch.cuda.stream(streams[below(3)] if streams else None):
            arguments = problem(cell, T, B, 4, H, directions=directions, packed=packed, dtype=dtype)
            strategies.update(place.plan(tier, cell, arguments, dtype))
            worst = one_round(place, cell, place.put(arguments), arguments, tier) / (
                ROUNDINGS * rounding(dtype)
            )
        pending.append((what, worst))
        if count % 50 == 0 or count == rounds:
            for stream in streams:
                with torch.cuda.stream(stream):
                    place.finish(f"one of the rounds up to {what}")
            for name, part in pending:
                assert part.item() <= 1, f"{name}: {part.item():.2f} of what it may differ by"
            pending.clear()
    tally = {tier: strategies[tier] for tier in TIERS}
    assert sum(tally.values()) > rounds / 2, f"what ran: {strategies}"


def one_round(place: Place, cell: str, inputs, arguments, tier: str) -> torch.Tensor:
    """The largest difference between a strategy and the step kernels, not waited for. Backward from the same saved
    tensors, so that a relu has the same slopes."""
    with place.forced("step"):
        output, hn, cn, saved = ops.layer_forward(cell, *inputs, True)
    gradients = [
        torch.ones_like(output),
        torch.ones_like(hn),
        torch.ones_like(cn) if cell == "lstm" else None,
    ]
    call = (cell, *gradients, *inputs, output, saved, wanted_bits(arguments))
    with place.forced("step"):
        expected = [output, hn, *ops.layer_backward(*call)]
    with place.forced(tier):
        found = [*ops.layer_forward(cell, *inputs, True)[:2], *ops.layer_backward(*call)]
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    return torch.stack([persistent_checks.distance(f, e) for f, e in pairs]).max()


@pytest.mark.cuda
def test_some_hundred_launches():
    with GPU.open():
        soak(GPU, 150, largest=1.0, seed=0)


@pytest.mark.cuda
@pytest.mark.soak
@pytest.mark.slow
def test_ten_thousand_launches():
    with GPU.open():
        soak(GPU, 5000, largest=1.0, seed=1)


def test_the_soak_test_itself():
    with EMULATED.open():
        soak(EMULATED, 6, largest=0.05, seed=2)
