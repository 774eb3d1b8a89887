"""The choice of CUDA kernels, on any machine: `_C.plan` is a pure function of a problem and a GPU."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from fused_rnn_bench.case import Case
from fused_rnn_bench.cli import main
from fused_rnn_bench.explain import strategies

import fused_rnn
from fused_rnn import _C

CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# Results of the special-function unit that a unit of a row takes, forward and backward; test_cuda_binary.py counts.
SPECIALS = {"lstm": (10, 2), "gru": (6, 0), "rnn_tanh": (2, 0), "rnn_relu": (0, 0)}
DTYPES = ("fp32", "tf32", "fp64", "fp16", "bf16")
PERSISTENT = ("block", "cluster", "grid")
# The most that a block may ask for, by CUDA's tables of compute capabilities.
SHARED_KB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
PASSES = ("", "backward_")


def plan(strategy: str | None = None, **changes: Any) -> dict[str, Any]:
    problem = {"cell": "lstm", "dtype": "bf16", "T": 100, "B": 16, "I": 64, "H": 256}
    problem |= {"arch": "sm_90", "training": True, **changes}
    if strategy is None:
        return _C.plan(**problem)
    with fused_rnn.force_plan(strategy):
        return _C.plan(**problem)


def tile(text: str) -> tuple[int, ...]:
    """Replicas, blocks of each, units and rows of a block, parts of a sum."""
    found = re.fullmatch(
        r"(\d+) replicas? of (\d+) blocks?, each with (\d+) units? of (\d+) rows?, sums in (\d+) parts?", text
    )
    assert found, text
    return tuple(map(int, found.groups()))


def many() -> list[dict[str, Any]]:
    shapes = [(1, 1, 1, 1), (50, 1, 3, 7), (300, 16, 64, 65), (1000, 65, 512, 512), (20, 300, 100, 1024)]
    shapes += [(5, 70000, 64, 128), (10**6, 1, 1, 2000), (2, 4, 8192, 8192)]
    return [
        {"cell": cell, "dtype": dtype, "arch": arch, "directions": directions}
        | dict(zip("TBIH", shape, strict=True))
        for cell, dtype, arch, directions, shape in itertools.product(
            CELLS, DTYPES, SHARED_KB, (1, 2), shapes
        )
    ]


@pytest.mark.parametrize("asked", [None, "persistent", *PERSISTENT])
def test_every_problem_has_a_plan_that_its_gpu_can_run(asked: str | None) -> None:
    seen = set()
    for problem in many():
        found = plan(asked, **problem)
        B, H, arch, directions = (problem[name] for name in ("B", "H", "arch", "directions"))
        multiprocessors = int(found["arch"].split()[2])
        for prefix in PASSES:
            strategy = found[prefix + "strategy"]
            seen.add(strategy)
            assert found[prefix + "why"]
            step, floor = found[prefix + "modelled_step_ns"], found[prefix + "floor_step_ns"]
            assert 0 < floor <= step, problem
            assert found[prefix + "modelled_total_ns"] >= (step - 1) * problem["T"]
            if strategy not in PERSISTENT:
                assert strategy == "step" or (strategy == "step_fused" and prefix == "")
                assert prefix + "tile" not in found
                continue
            assert asked in (None, "persistent", strategy)
            assert problem["dtype"] != "fp64" and arch != "sm_75"
            replicas, blocks, units, rows, parts = tile(found[prefix + "tile"])
            # a cluster has a second block even where one holds everything: st.async needs it
            least = 2 if strategy == "cluster" else 1
            assert blocks * units >= H and (blocks == least or (blocks - 1) * units < H)
            assert blocks >= least
            assert replicas % directions == 0
            assert replicas // directions * rows >= B > (replicas // directions - 1) * rows
            # 256 bytes of every sum are a warp's share, kept in its registers
            assert parts * (64 if problem["dtype"].endswith("32") else 128) >= H
            assert (units, rows % 8) == (128 // parts, 0)
            assert 0 < found[prefix + "shared_bytes"] <= SHARED_KB[arch] * 1024
            assert (strategy == "block") == (blocks == parts == 1)
            if strategy != "block":  # fewer kernels to compile: persistent.h
                few = problem["dtype"] == "fp32" or int(arch[3:]) >= 90
                in_cluster = (4,) if problem["dtype"] == "fp32" else (2, 4)
                assert parts in (in_cluster if strategy == "cluster" else (8,) if few else (2, 4, 8))
            if strategy == "cluster":
                assert blocks <= (16 if arch in ("sm_90", "sm_100") else 8) and int(arch[3:]) >= 90
            if strategy == "grid":
                assert replicas * blocks <= multiprocessors
    steps = {"step", "step_fused"}
    assert seen == steps | ({asked} if asked in PERSISTENT else set(PERSISTENT))


def test_persistent_kernels_are_chosen_where_they_are_ahead_by_a_margin() -> None:
    """kMargin in csrc/cuda/plan.cpp; the first measurements lower it."""
    ahead = []
    for problem in many()[::5]:
        found, best = plan(**problem), plan("persistent", **problem)
        steps = plan("step_fused" if problem["B"] <= 8 else "step", **problem)
        for prefix in PASSES:
            name, total = prefix + "strategy", prefix + "modelled_total_ns"
            if best[name] not in PERSISTENT:
                continue
            ahead.append(steps[total] / best[total])
            chosen = best if ahead[-1] >= 1.5 else steps
            assert (found[name], found[total]) == (chosen[name], chosen[total]), problem
            assert ("not persistent" in found[prefix + "why"]) == (chosen is steps)
    assert min(ahead) < 1 and any(1 < by < 1.5 for by in ahead) and max(ahead) > 5
    assert "expected to be 1.5 times as fast" in plan(H=700, B=64, T=1000)["backward_why"]


def test_explain_says_that_the_first_use_is_checked() -> None:
    assert "its first use is checked" in plan()["why"] and "checked" not in plan("persistent")["why"]


@pytest.mark.parametrize(
    ("strategy", "dtype", "arch", "reach"),
    [
        ("block", "bf16", "sm_80", 128),
        ("block", "fp16", "sm_90", 128),
        ("block", "tf32", "sm_90", 64),
        ("block", "fp32", "sm_80", 64),
        ("cluster", "bf16", "sm_80", 0),
        ("cluster", "bf16", "sm_90", 512),
        ("cluster", "tf32", "sm_100", 256),
        ("cluster", "fp32", "sm_90", 256),
        ("cluster", "fp32", "sm_100", 256),
        ("cluster", "fp16", "sm_120", 256),
        ("grid", "fp16", "sm_80", 1024),
        ("grid", "bf16", "sm_90", 1024),
        ("grid", "tf32", "sm_100", 512),
        ("grid", "fp32", "sm_80", 512),
        ("grid", "fp32", "sm_90", 512),
    ],
)
def test_reach(strategy: str, dtype: str, arch: str, reach: int) -> None:
    """The hidden size up to which registers hold the weights."""
    for prefix, H in itertools.product(PASSES, (1, reach, reach + 1)):
        found = plan(strategy, H=max(H, 1), B=1, dtype=dtype, arch=arch)[prefix + "strategy"]
        assert (found == strategy) == (1 <= H <= reach)


@pytest.mark.parametrize(
    ("problem", "obstacle"),
    [
        ({"dtype": "fp64"}, "float64"),
        ({"P": 64}, "projection"),
        ({"dtype": "fp16", "arch": "sm_75"}, "sm_80"),
        ({"dtype": "fp32", "arch": "sm_75"}, "sm_80"),
        ({"dtype": "fp32", "H": 513}, "cannot hold the weights"),
        ({"H": 1025}, "cannot hold the weights"),
        ({"H": 1000, "B": 500}, "cannot hold the weights and the rows"),
        ({"H": 1000, "B": 2, "multiprocessors": 62}, "cannot hold the weights and the rows"),
        ({"T": 1}, "too few steps"),
    ],
)
def test_what_keeps_persistent_kernels_away(problem: dict, obstacle: str) -> None:
    found = plan(**problem)
    for prefix in PASSES:
        assert found[prefix + "strategy"].startswith("step")
        assert obstacle in found[prefix + "why"].partition("; not persistent: ")[2]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("B", "H"), [(8, 1024), (16, 600), (40, 300)])
def test_a_grid_is_never_larger_than_what_runs_at_once(B: int, H: int, directions: int) -> None:
    """The bound is tight: one multiprocessor fewer, and another plan is needed."""
    problem = {"B": B, "H": H, "directions": directions}
    for prefix in PASSES:
        found = plan("grid", multiprocessors=10**4, **problem)
        replicas, blocks, *_ = tile(found[prefix + "tile"])
        fewer = plan("grid", multiprocessors=replicas * blocks - 1, **problem)
        assert (
            plan("grid", multiprocessors=replicas * blocks, **problem)[prefix + "tile"]
            == found[prefix + "tile"]
        )
        assert fewer.get(prefix + "tile") != found[prefix + "tile"]
        assert plan("grid", multiprocessors=1, **problem)[prefix + "strategy"].startswith("step")


def test_the_cheapest_of_the_persistent_strategies() -> None:
    for B, H, dtype in itertools.product((1, 20, 200), (60, 250, 500), ("bf16", "tf32", "fp32")):
        costs = {}
        for strategy in PERSISTENT:
            found = plan(strategy, B=B, H=H, dtype=dtype)
            if found["strategy"] == strategy:
                costs[strategy] = found["modelled_total_ns"]
        best = plan("persistent", B=B, H=H, dtype=dtype)
        if costs:
            assert best["modelled_total_ns"] == min(costs.values()) == costs[best["strategy"]]
        else:
            assert best["strategy"] == "step"


def totals(name: str, values: tuple, strategy: str | None = "persistent", **problem: Any) -> list[list[int]]:
    """What the passes cost, for each value of `name`; passes that the strategy cannot run are left out."""
    found = [plan(strategy, **problem, **{name: value}) for value in values]
    chosen = PERSISTENT if strategy == "persistent" else (strategy,)
    return [
        [p[prefix + "modelled_total_ns"] for p in found if p[prefix + "strategy"] in chosen]
        for prefix in PASSES
    ]


@pytest.mark.parametrize(
    ("strategy", "dtype"), [("persistent", "bf16"), ("persistent", "fp32"), ("step", "bf16")]
)
@pytest.mark.parametrize("cell", CELLS)
def test_more_work_never_costs_less(cell: str, strategy: str, dtype: str) -> None:
    for name, values in {
        "T": (1, 2, 10, 1000, 10**5),
        "B": (*range(1, 40), 64, 100, 128, 256, 1000),
        "H": (*range(1, 140), *range(140, 1024, 13), 1024),
        "directions": (1, 2),
        "packed": (False, True),
    }.items():
        for costs in totals(name, values, strategy, cell=cell, dtype=dtype):
            assert costs == sorted(costs) and len(costs) > 1, name


def test_more_multiprocessors_never_cost_more() -> None:
    for B, H in ((16, 128), (300, 128), (16, 256), (100, 256), (16, 800)):
        for costs in totals("multiprocessors", (50, 64, 100, 132, 200, 500), B=B, H=H):
            assert costs == sorted(costs, reverse=True)


def test_short_sequences_are_not_worth_loading_the_weights() -> None:
    """And there is one length from which on they are."""
    assert plan("step", T=1)["modelled_total_ns"] < plan("cluster", T=1)["modelled_total_ns"]
    for prefix in PASSES:
        by_steps = [plan(T=T)[prefix + "strategy"] == "step" for T in range(1, 60)]
        assert 0 < by_steps.count(True) < 30
        assert by_steps == sorted(by_steps, reverse=True)
    assert "too few steps to pay for loading the weights" in plan(T=1)["why"]


def special_ns(cell: str, units: float, rows: int, backward: bool = False) -> float:
    """Of so many units and rows in a multiprocessor, which gives 16 results a cycle of 1.98 GHz."""
    return units * rows * SPECIALS[cell][backward] / (16 * 1.98)


def test_the_floor_is_the_formula_s() -> None:
    """max(products, weights from shared memory) + exchange + the exponentials of four rows + 80 ns, worked out by hand:
    on one block, where the exchange is a barrier of 20 ns; on 16 blocks of a cluster; and on 132 multiprocessors."""
    block = 2 * 4 * 64 * 64 * 8 / 4340 + 20 + special_ns("lstm", 64, 4) + 80
    assert plan(B=1, H=64)["floor_step_ns"] == round(block)
    cluster = 2 * 4 * 512 * 512 * 8 / (16 * 4340) + 170 + 512 * 2 / 29 + special_ns("lstm", 512 / 16, 4) + 80
    assert plan(B=1, H=512)["floor_step_ns"] == round(cluster)
    grid = 2 * 4 * 1024**2 * 8 / (132 * 4340) + 500 + 132 * 1024 * 2 / 6900
    assert plan(B=1, H=1024)["floor_step_ns"] == round(grid + special_ns("lstm", 1024 / 132, 4) + 80)


@pytest.mark.parametrize("cell", CELLS)
def test_a_block_takes_the_exponentials_of_four_warps_or_of_eight(cell: str) -> None:
    """Of 64 units or of 128, though the layer has fewer: four schedulers have a warp of 16 each, or two. And of four
    rows or of eight."""
    gates = CELLS[cell]
    for H, B in itertools.product((1, 64, 65, 100, 128), (1, 4, 5, 8)):
        found = plan("block", cell=cell, B=B, H=H)
        for prefix in PASSES:
            numbers = -(-H // 32) * 32 * 8  # that a warp multiplies, of a row's pieces and of eight rows
            read = 8 * numbers * 2 * (gates if prefix else 1) / 225
            product = max(2 * gates * 128 * numbers / 4340, read)
            exponentials = special_ns(cell, 64 if H <= 64 else 128, 4 if B <= 4 else 8, bool(prefix))
            assert found[prefix + "modelled_step_ns"] == round(product + 20 + exponentials + 80)
    by_cell = {other: plan("block", cell=other, B=8, H=128)["modelled_step_ns"] for other in CELLS}
    assert by_cell[cell] - by_cell["rnn_relu"] > special_ns(cell, 128, 8) - 1  # each is rounded


@pytest.mark.parametrize(
    ("strategy", "B", "H", "cells"),
    [
        ("block", 8, 16, 16 * 4 * 8),  # one warp has all
        ("cluster", 1, 512, 16 * 4 * 4),  # two warps of eight have the four rows; four take no longer
        ("cluster", 8, 16, 16 * 4 * 4),
        ("cluster", 8, 512, 16 * 4 * 4),
        ("cluster", 100, 512, 16 * 4 * 8),  # replicas of 16 rows, since eight blocks of 16 run at once
        ("grid", 1, 1024, 16 * 4 * 4),  # one warp has the four rows
        ("grid", 16, 1024, 16 * 4 * 4),
        ("grid", 17, 1024, 16 * 4 * 8),  # of five warps two share a scheduler
    ],
)
def test_a_scheduler_that_has_more_warps_than_the_others_is_waited_for(
    strategy: str, B: int, H: int, cells: int
) -> None:
    tanh, relu = (
        plan(strategy, cell=cell, B=B, H=H)["modelled_step_ns"] for cell in ("rnn_tanh", "rnn_relu")
    )
    assert abs(tanh - relu - special_ns("rnn_tanh", cells, 1)) <= 1


def test_exact_products_take_the_instructions_that_they_need() -> None:
    """For four rows a warp with 16 units of an LSTM and 64 numbers of k has 512 multiply-adds; forward 32 loads, and 24
    shuffles with a sum each; backward 64 and 30. A multiprocessor issues 4 instructions a cycle, of 8 warps. The cells'
    exponentials are as many as those of other numbers."""
    for prefix, instructions in (("", 512 + 32 + 48), ("backward_", 512 + 64 + 60)):
        product = 2 * instructions / 1.98
        cost = {B: plan("block", B=B, H=64, dtype="fp32")[prefix + "modelled_step_ns"] for B in (1, 4, 5, 8)}
        few, many = (special_ns("lstm", 64, rows, bool(prefix)) for rows in (4, 8))
        assert cost[1] == cost[4] and cost[5] == cost[8]
        assert abs(cost[4] - product - few - 100) <= 1 and abs(cost[8] - 2 * product - many - 100) <= 1


def test_the_input_of_a_persistent_kernel_comes_in_chunks() -> None:
    found = plan("persistent", T=10**5, B=64, H=512)
    steps = int(found["input"].split()[3])
    assert found["launches"] == -(-(10**5) // steps) > 1 and found["backward_launches"] == 1
    assert steps * 64 * 4 * 512 * 4 <= 141 * 2**20 < (steps + 1) * 64 * 4 * 512 * 4
    assert plan("persistent", T=50)["launches"] == 1


def test_explain_shows_both_passes_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["explain", "--cell", "gru", "--shape", "200,16,64,256", "--device", "cuda", "--arch", "sm_90"]
    options += ["--dtype", "bf16"]
    assert main([*options, "--mode", "train"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    expected = plan(cell="gru", T=200)
    for name in (
        "strategy",
        "modelled_step_ns",
        "floor_step_ns",
        "backward_strategy",
        "backward_floor_step_ns",
    ):
        assert f"{name} {expected[name]}" in shown
    assert shown.count("first use is checked") == 2
    assert main([*options, "--mode", "infer"]) == 0
    assert "backward" not in capsys.readouterr().out


def test_a_result_file_says_which_kernels_ran() -> None:
    case = {"cell": "gru", "dtype": "bf16", "T": 200, "B": 16, "I": 64, "H": 256}
    both = {"strategy": "cluster", "backward_strategy": "cluster"}
    assert strategies(Case(mode="train", device="cuda", **case)) == both
    assert strategies(Case(mode="infer", device="cuda", **case)) == {"strategy": "cluster"}
    assert strategies(Case(mode="infer", device="cpu", **case)) == {}
    assert strategies(Case(mode="infer", device="cuda", **{**case, "cell": "gru_cell"})) == {}
