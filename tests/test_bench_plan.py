"""`fused-rnn-bench run --plan`: a strategy of the CUDA kernels forced for a whole run, and what the file says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fused_rnn_bench import cli, commands
from fused_rnn_bench.case import Case
from fused_rnn_bench.cli import main
from fused_rnn_bench.explain import strategies
from fused_rnn_bench.results import OURS, load
from fused_rnn_bench.runner import Runner
from test_bench_run import TINY
from test_bench_run import quick_ceiling as quick_ceiling

import fused_rnn

GPU_CASE = Case("gru", "infer", "bf16", "cuda", 200, 16, 256, 256)


def test_the_strategies_that_can_be_asked_for_are_the_planner_s():
    for strategy in cli.PLANS:
        with fused_rnn.force_plan(strategy):
            assert strategies(GPU_CASE)["plan"] == strategy
    with pytest.raises(ValueError, match=f"expected {', '.join(cli.PLANS)}$"):
        fused_rnn.force_plan("fast").__enter__()


def test_what_was_asked_for_and_what_ran_are_in_the_file():
    """Of what has no persistent kernel too: the file then says that steps ran."""
    assert "plan" not in strategies(GPU_CASE)
    with fused_rnn.force_plan("persistent"):
        both = strategies(replace(GPU_CASE, mode="train"))
        assert both.pop("plan") == "persistent" and len(both) == 2
        assert set(both.values()) <= {"block", "cluster", "grid"}
        assert strategies(replace(GPU_CASE, dtype="fp64")) == {"strategy": "step", "plan": "persistent"}


def test_a_plan_is_forced_while_the_cases_run_and_not_after(monkeypatch, quick_ceiling):
    """On a CPU that passes for a GPU until there are contenders to run."""
    seen = []
    monkeypatch.setattr(commands, "_device", lambda _: "cpu")
    monkeypatch.setattr(commands, "_cases", lambda *_: [])
    monkeypatch.setattr(Runner, "run", lambda *_: seen.append(fused_rnn._C.forced_plan()))
    for asked in (["--plan", "grid"], []):
        assert main(["run", *TINY, *asked]) == 0
    assert seen == ["grid", None] and fused_rnn._C.forced_plan() is None


@pytest.mark.cuda
def test_a_gpu_run_with_a_plan(tmp_path):
    """Both of them: what is forced on ours is not forced on torch.nn."""
    out = tmp_path / "run.json"
    shape = ["--shape", "6,8,32,32", "--effort", "0", "--against", "torch", "--device", "cuda", "--graph"]
    assert main(["run", *shape, "--dtype", "bf16", "--plan", "persistent", "--out", str(out)]) == 0
    for record in load(out).records:
        ours, theirs = record.entries[OURS], record.entries["torch"]
        assert ours.settings["plan"] == "persistent" and not theirs.settings
        assert ours.status == theirs.status == "ok"
