"""The operators by way of the persistent CUDA kernels, emulated, against ``reference.py`` in float64: everything that
stands between an operator's tensors and those kernels. Whatever the step kernels are off by, the persistent ones may be
off by twice as much and two roundings more. The emulation's matrix products know no TF32, which has three more bits
than bfloat16: with numbers that both can hold, an eighth of what the step kernels are off by in bfloat16 takes their
place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import emulated
import pytest
import torch
from emulated import a_gpu, forced
from test_ops import CELLS, gradients_by_reference, make_layer, wanted_bits
from test_reset import mask_for, reset_by_operators, reset_by_reference
from torch import Tensor

import fused_rnn
from fused_rnn import _C, ops, reference

TIERS = ("block", "cluster", "grid")
TF32 = 2.0**-10  # a rounding of a factor
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The planner's names of what kernels multiply.
NUMBERS = {"tf32": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Arguments = list[Tensor | None]
Values = list[Tensor | None]

tiers = pytest.mark.parametrize("tier", TIERS)
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    with emulated.unfair_schedules(), emulated.in_place_of_the_cpu():
        yield
    torch.backends.cudnn.rnn.fp32_precision = before


def use(numbers: str) -> torch.dtype:
    """Its dtype; float32 is multiplied as the name says from here to the end of the test."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee" if numbers == "fp32" else "tf32"
    return NUMBERS[numbers]


def is_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"


def rounding(dtype: torch.dtype) -> float:
    return TF32 if is_tf32(dtype) else EPS[dtype]


def problem(cell: str, *sizes: int, dtype: torch.dtype, **options: bool | int) -> Arguments:
    """`make_layer`, in TF32 with numbers of bfloat16."""
    if not is_tf32(dtype):
        return make_layer(cell, *sizes, dtype=dtype, **options)
    arguments = make_layer(cell, *sizes, dtype=torch.bfloat16, **options)
    return [a.float() if a is not None and a.is_floating_point() else a for a in arguments]


def exact(values: Values) -> Values:
    return [v.double() if v is not None and v.is_floating_point() else v for v in values]


def both_passes(
    cell: str, arguments: Arguments, gradients: Values, forward: str, backward: str | None = None
) -> Values:
    """Results, then gradients; both passes by one strategy unless the backward pass has another."""
    with forced(forward):
        output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
    with forced(backward or forward):
        *found, _ = ops.layer_backward(cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
    return [output, hn, cn if cell == "lstm" else None, *found]


def gradients_like(cell: str, arguments: Arguments, dtype: torch.dtype) -> tuple[Values, Values]:
    """Random gradients of the results, and what the reference makes of everything."""
    expected = reference.layer(cell, *exact(arguments))
    gradients = [None if e is None else torch.randn(e.shape, dtype=torch.float64).to(dtype) for e in expected]
    return gradients, [*expected, *gradients_by_reference(cell, exact(arguments), exact(gradients))]


def errors(found: Values, wanted: Values) -> list[float]:
    """The largest of each tensor, as a part of its largest number or of 1."""
    result = []
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None or theirs.numel() == 0:
            assert ours is None or ours.numel() == 0
            continue
        assert ours is not None and ours.shape == theirs.shape
        scale = max(1.0, theirs.abs().max().item())
        worst = (ours.double() - theirs).abs().max().item() / scale
        assert worst == worst, "NaN"
        result.append(worst)
    return result


def step_errors(cell: str, arguments: Arguments, gradients: Values, wanted: Values) -> list[float]:
    share = 1.0
    if is_tf32(arguments[0].dtype):
        arguments = [a.bfloat16() if a is not None and a.is_floating_point() else a for a in arguments]
        gradients, wanted = gradients_like(cell, arguments, torch.bfloat16)
        share = TF32 / EPS[torch.bfloat16]
    return [share * error for error in errors(both_passes(cell, arguments, gradients, "step"), wanted)]


def as_good_as_steps(ours: list[float], theirs: list[float], eps: float) -> None:
    for k, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our <= 2 * their + 2 * eps, f"result {k}: off by {our}, the step kernels by {their}"


def check(cell: str, arguments: Arguments, strategy: str, backward: str | None = None) -> None:
    dtype = arguments[0].dtype
    gradients, wanted = gradients_like(cell, arguments, dtype)
    ours = errors(both_passes(cell, arguments, gradients, strategy, backward), wanted)
    if cell == "rnn_relu" and is_tf32(dtype):
        # Its slope jumps at 0, and TF32 brings some sums to the other side: gradients by way of float32's sums.
        ours[2:] = errors(both_passes(cell, arguments, gradients, "step", backward or strategy), wanted)[2:]
    as_good_as_steps(ours, step_errors(cell, arguments, gradients, wanted), rounding(dtype))


# One warp and several, one block and several, odd sizes, rows that fill no tile, one step.
SHAPES = [(1, 1, 1, 1), (17, 3, 5, 7), (3, 9, 4, 65), (2, 17, 3, 129), (3, 5, 8, 200)]


@tiers
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("T, B, I, H", SHAPES)
@cells
def test_agrees_with_reference(cell: str, T: int, B: int, I: int, H: int, numbers: str, tier: str) -> None:
    dtype = use(numbers)
    if tier == "block":  # what it reaches, in test_plan.py
        H = min(H, 64 if dtype == torch.float32 else 128)
    sizes = {"T": T, "B": B, "I": I, "H": H, "directions": 2}
    with fused_rnn.force_plan(tier):
        plan = _C.plan(cell=cell, dtype=numbers, **sizes, packed=B > 1, training=True, arch="sm_90")
    assert (plan["strategy"], plan["backward_strategy"]) == (tier, tier), "no step kernel takes its place"
    arguments = problem(cell, T, B, I, H, directions=2, packed=B > 1, dtype=dtype)
    check(cell, arguments, tier)


@pytest.mark.parametrize("rows", [20, 32])
@pytest.mark.parametrize("numbers", ["tf32", "fp32", "bf16"])
@cells
def test_a_block_takes_as_many_rows_as_it_must(cell: str, numbers: str, rows: int) -> None:
    """13 blocks hold the weights, and there are no more: the rows lie in 3 or 4 groups of 8."""
    dtype = use(numbers)
    with fused_rnn.force_plan("grid"):
        plan = _C.plan(cell=cell, dtype=numbers, T=3, B=rows, I=4, H=200, arch="sm_90", multiprocessors=13)
    assert f"13 blocks, each with 16 units of {(rows + 7) // 8 * 8} rows" in plan["tile"]
    with a_gpu(planned=13, multiprocessors=13):
        check(cell, problem(cell, 3, rows, 4, 200, packed=True, dtype=dtype), "grid")


@tiers
@pytest.mark.parametrize(
    "directions, packed, states, bias",
    list(itertools.product((1, 2), (False, True), (False, True), (False, True))),
)
@cells
def test_every_form(cell: str, directions: int, packed: bool, states: bool, bias: bool, tier: str) -> None:
    options = {"directions": directions, "packed": packed, "states": states, "bias": bias}
    arguments = make_layer(cell, 5, 11, 6, 20, dtype=torch.float16, **options)
    check(cell, arguments, tier)


@tiers
@cells
def test_both_directions_and_all_steps_are_one_launch(cell: str, tier: str) -> None:
    """Two cooperative launches on two streams might wait for each other for ever."""
    arguments = make_layer(cell, 5, 11, 6, 20, directions=2, dtype=torch.float16)
    runtime = emulated.load().runtime
    with forced(tier):
        before = runtime.frnn_emulation_launches()
        output, _, _, saved = ops.layer_forward(cell, *arguments, True)
        between = runtime.frnn_emulation_launches()
        gradients = [torch.ones_like(output), None, None]
        ops.layer_backward(cell, *gradients, *arguments, output, saved, wanted_bits(arguments))
        after = runtime.frnn_emulation_launches()
    assert (between - before, after - between) == (1, 1)


@tiers
@cells
def test_what_is_not_wanted_is_not_computed(cell: str, tier: str) -> None:
    """Inference saves nothing and gives the same; absent gradients are zero; each gradient can be had alone."""
    arguments = make_layer(cell, 4, 3, 5, 9, packed=True, dtype=torch.float16)
    with forced(tier):
        output, hn, cn, saved = ops.layer_forward(cell, *arguments, True)
        inference = ops.layer_forward(cell, *arguments, False)
        assert inference[3].numel() == 0 < max(saved.numel(), 1)
        for ours, theirs in zip((output, hn, cn), inference[:3], strict=True):
            assert torch.equal(ours, theirs)
        gradient = torch.randn_like(hn)
        call = [cell, None, gradient, None, *arguments, output, saved]
        every = ops.layer_backward(*call, wanted_bits(arguments))
        zero = [cell, torch.zeros_like(output), gradient, torch.zeros_like(cn) if cell == "lstm" else None]
        same = ops.layer_backward(*zero, *arguments, output, saved, wanted_bits(arguments))
        for k, wanted in enumerate(every):
            assert wanted is None or torch.equal(wanted, same[k])
            alone = ops.layer_backward(*call, wanted_bits(arguments) & 1 << k)
            for j, found in enumerate(alone):
                assert (
                    (found is not None and torch.equal(found, wanted))
                    if j == k and wanted is not None
                    else found is None
                )


@pytest.mark.parametrize("other", ["step", "cluster", "grid"])
@tiers
@cells
def test_a_backward_pass_follows_any_forward_pass(cell: str, tier: str, other: str) -> None:
    arguments = make_layer(cell, 4, 10, 5, 24, directions=2, packed=True, dtype=torch.bfloat16)
    check(cell, arguments, tier, backward=other)
    check(cell, arguments, "step", backward=tier)


@tiers
@pytest.mark.parametrize("packed", [False, True])
@cells
def test_reset_mask(cell: str, packed: bool, tier: str) -> None:
    arguments = make_layer(cell, 6, 5, 4, 20, directions=2, packed=packed, dtype=torch.float16)
    reset = mask_for(arguments)
    wanted = [w for w in reset_by_reference(cell, exact(arguments), reset) if w is not None]

    def call(strategy: str) -> list[float]:
        with forced(strategy):
            found = [f for f in reset_by_operators(cell, arguments, reset) if f is not None]
        return errors(found, wanted)

    as_good_as_steps(call(tier), call("step"), EPS[torch.float16])


@tiers
@cells
def test_a_long_sequence_takes_several_launches(cell: str, tier: str) -> None:
    """The input's side of two steps fits the memory that it may take: nine steps, packed, both directions."""
    arguments = make_layer(cell, 9, 5, 4, 20, directions=2, packed=True, dtype=torch.float16)
    runtime = emulated.load().runtime
    step = 2 * 5 * ops.CELLS[cell].gates * 20 * 4

    def products() -> tuple[int, tuple[Tensor, ...]]:
        before = runtime.frnn_emulation_products()
        with forced(tier):
            found = ops.layer_forward(cell, *arguments, True)
        return runtime.frnn_emulation_products() - before, found

    count, whole = products()
    assert count == 2  # one for each direction
    with a_gpu(memory=1024 * 2 * step):
        count, parts = products()
    assert count == 10
    wanted = reference.layer(cell, *exact(arguments))
    eps = EPS[torch.float16]
    as_good_as_steps(errors(list(parts[:3]), [*wanted]), errors(list(whole[:3]), [*wanted]), eps)
    torch.testing.assert_close(parts[3], whole[3], rtol=2 * eps, atol=2 * eps)


def test_more_rows_than_the_arguments_of_a_kernel_have_room_for() -> None:
    """Of a packed batch of 1100 rows the lengths reach the GPU in three parts."""
    arguments = make_layer("rnn_tanh", 3, 1100, 2, 3, packed=True, dtype=torch.float16)
    emulated.load().runtime.frnn_emulation_set_yield_probability(0.0)
    with forced("block"):
        output, hn, *_ = ops.layer_forward("rnn_tanh", *arguments, False)
    wanted = reference.layer("rnn_tanh", *exact(arguments))
    assert max(errors([output, hn], [*wanted[:2]])) < 8 * EPS[torch.float16]


def test_a_gpu_without_room_for_all_blocks_at_once_runs_step_kernels() -> None:
    """The plan knows how many multiprocessors there are, not how many of them are free. The emulation, as CUDA, refuses
    a cooperative launch that is too large."""
    arguments = make_layer("lstm", 3, 9, 5, 200, dtype=torch.float32)
    gradients, _ = gradients_like("lstm", arguments, torch.float32)
    expected = both_passes("lstm", arguments, gradients, "step")
    with a_gpu(multiprocessors=1):
        found = both_passes("lstm", arguments, gradients, "grid")
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = both_passes("lstm", arguments, gradients, "grid")
    assert not torch.equal(found[0], expected[0]) and not torch.equal(
        found[3], expected[3]
    )  # rounded to TF32


@tiers
@cells
def test_torch_s_switch_rules_float32(cell: str, tier: str) -> None:
    """Each pass by the switch as it stands then; a persistent kernel runs either way, and adds up in its own order."""
    arguments = make_layer(cell, 5, 9, 6, 33, dtype=torch.float32)
    gradients, wanted = gradients_like(cell, arguments, torch.float32)
    found = {}
    for numbers in ("tf32", "fp32"):
        use(numbers)
        found[numbers] = both_passes(cell, arguments, gradients, tier)
    step = both_passes(cell, arguments, gradients, "step")
    far, near = (errors(found[numbers], wanted) for numbers in ("tf32", "fp32"))
    assert max(near) < 32 * EPS[torch.float32] < TF32 / 8 < max(far) < 8 * TF32
    assert not torch.equal(found["fp32"][0], step[0])


@pytest.mark.parametrize("strategy", ["persistent", *TIERS])
@cells
def test_single_cells_stay_with_the_step_kernels(cell: str, strategy: str) -> None:
    """In float32, where the others would round to TF32."""
    input, _, h0, c0, *weights = make_layer(cell, 1, 9, 5, 16, dtype=torch.float32)
    call = [cell, input[0], h0[0], None if c0 is None else c0[0], *weights[:4], True]
    expected = ops.cell_forward(*call)
    with forced(strategy):
        found = ops.cell_forward(*call)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@tiers
def test_no_schedule_changes_a_bit(tier: str) -> None:
    runtime = emulated.load().runtime
    arguments = make_layer("lstm", 4, 9, 6, 50, directions=2, packed=True, dtype=torch.bfloat16)
    gradients, _ = gradients_like("lstm", arguments, torch.bfloat16)
    results, schedules = [], set()
    for seed in range(3):
        runtime.frnn_emulation_set_seed(seed)
        results.append(both_passes("lstm", arguments, gradients, tier))
        schedules.add(runtime.frnn_emulation_schedule())
    assert len(schedules) == 3
    for other in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@tiers
def test_training_a_module(tier: str) -> None:
    """From the top: two layers, both directions, an optimiser's step away from torch.nn in float32."""
    theirs = torch.nn.GRU(6, 18, num_layers=2, bidirectional=True)
    ours = fused_rnn.GRU(6, 18, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 5, 6)
    for module in (theirs, ours):
        with forced(tier):
            output, hn = module(x)
            (output.square().sum() + hn.sum()).backward()
    for (name, wanted), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        scale = wanted.grad.abs().max().item()
        torch.testing.assert_close(
            found.grad, wanted.grad, rtol=0, atol=4 * TF32 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
