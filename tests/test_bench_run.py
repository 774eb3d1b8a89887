"""`fused-rnn-bench run` and `explain`, as a user calls them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from fused_rnn_bench import ceiling
from fused_rnn_bench.cli import main
from fused_rnn_bench.cost import Ceiling
from fused_rnn_bench.peers import registry
from fused_rnn_bench.peers.base import LocalRunnable
from fused_rnn_bench.peers.modules import FusedRnn, TorchNN
from fused_rnn_bench.results import OURS, load
from fused_rnn_bench.stats import Spread
from fused_rnn_bench.timing import CpuStopwatch, Effort

TINY = ["--shape", "4,2,8,8", "--effort", "0", "--threads", "1", "--against", "torch", "--device", "cpu"]


@pytest.fixture
def quick_ceiling(monkeypatch):
    """A made-up ceiling, for tests that are about something else."""
    made_up = Ceiling({"fp32": 1e11, "bf16": 1e11, "fp64": 1e11}, [(1e6, 1e10)])
    monkeypatch.setattr(ceiling, "measure_ceiling", lambda *_: made_up)


class Wrong(FusedRnn):
    """fused_rnn with one gradient, or one output, off by a thousandth."""

    def prepare(self, problem):
        runnable = super().prepare(problem)
        right = runnable.outputs

        def outputs():
            named = right()
            name = "grad input" if problem.training else "h_n"
            return named | {name: named[name] * 1.001}

        runnable.outputs = outputs
        return runnable


class Broken(FusedRnn):
    def prepare(self, problem):
        raise ValueError("the kernel is on holiday\nand will be back on Monday")


class Impatient(FusedRnn):
    """Someone presses Ctrl-C while the third case is being measured."""

    prepared = 0

    def prepare(self, problem):
        Impatient.prepared += 1
        if Impatient.prepared == 3:
            raise KeyboardInterrupt
        return super().prepare(problem)


def test_a_run_measures_saves_and_shows(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "lstm,gru_cell", "--out", str(out)]) == 0
    results = load(out)
    assert [(r.case.cell, r.case.mode) for r in results.records] == [
        ("lstm", "infer"), ("lstm", "train"), ("gru_cell", "infer"), ("gru_cell", "train"),
    ]  # fmt: skip
    for record in results.records:
        assert list(record.entries) == [OURS, "torch"]
        for entry in record.entries.values():
            assert entry.status == "ok" and len(entry.samples) >= 15 and entry.parity["ok"]
            assert (entry.memory is not None) == (record.case.mode == "train")
        assert record.speedup("torch") > 0
    assert (
        results.environment["threads"] == 1
        and results.environment["contenders"]["torch"] == torch.__version__
    )
    assert {"device_name", "commit", "date", "driver", "torch"} <= set(results.environment)
    assert results.settings["cell"] == ["lstm", "gru_cell"]
    assert results.ceiling.matmul["fp32"] > 1e8 and len(results.ceiling.copy) > 3
    shown = capsys.readouterr()
    assert "Speed-up of fused_rnn" in shown.out and "gru_cell" in shown.out
    assert "peak" in shown.out and "profiler" not in shown.out + shown.err
    assert "[4/4] gru_cell train fp32 4x2x8" in shown.err, "a log gets a line for each case"


def test_without_rich_a_run_is_shown_as_markdown(tmp_path, capsys, monkeypatch, quick_ceiling):
    """And a copy of a tree without its .git can be told what it is."""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("FUSED_RNN_COMMIT", "0123abc")
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "rnn", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "| rnn | train | fp32 | 4x2x8 |" in shown.out and "commit 0123abc" in shown.out
    assert "[2/2] rnn train fp32 4x2x8: fused_rnn" in shown.err
    assert load(out).environment["commit"] == "0123abc"


def test_dtypes_packed_input_and_stacks_run(tmp_path, quick_ceiling):
    out = tmp_path / "run.json"
    more = [
        "--dtype",
        "fp64,bf16",
        "--layers",
        "2",
        "--bidirectional",
        "--lengths",
        "varied",
        "--cell",
        "gru",
    ]
    assert main(["run", *TINY, *more, "--out", str(out)]) == 0
    assert {(r.case.dtype, r.case.shape) for r in load(out).records} == {
        ("fp64", "4x2x8 L2 bi varied"), ("bf16", "4x2x8 L2 bi varied"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "status", "told"),
    [(Wrong, "invalid", "where"), (Broken, "failed", "ValueError: the kernel is on holiday")],
)
def test_a_case_that_is_not_right_is_reported_and_fails_the_run(
    tmp_path, capsys, monkeypatch, quick_ceiling, ours, status, told
):
    monkeypatch.setattr(registry, "OURS", ours)
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "lstm", "--out", str(out)]) == 1
    for record in load(out).records:
        entry = record.entries[OURS]
        assert entry.status == status and told in entry.reason and not entry.samples
        assert record.entries["torch"].timed, "the peers are still measured"
        assert record.speedup("torch") is None
    shown = capsys.readouterr()
    assert status.upper() in shown.out and told in shown.out and told in shown.err
    if ours is Wrong:
        assert "grad input: error" in shown.out and "h_n: error" in shown.out


def test_a_peer_that_is_a_little_off_is_timed_and_marked(tmp_path, capsys, monkeypatch, quick_ceiling):
    class Peer(TorchNN):
        name = "onnxruntime"
        scale = 1 + 1e-6

        def prepare(self, problem):
            runnable = super().prepare(problem)
            right = runnable.outputs
            runnable.outputs = lambda: {"output": right()["output"] * self.scale}
            return runnable

    monkeypatch.setitem(registry.PEERS, "onnxruntime", Peer)
    against = [
        "--against",
        "onnxruntime",
        "--cell",
        "lstm",
        "--mode",
        "infer",
        "--out",
        str(tmp_path / "run.json"),
    ]
    assert main(["run", *TINY, *against]) == 0
    peer = load(tmp_path / "run.json").records[0].entries["onnxruntime"]
    assert peer.status == "loose" and peer.timed and "output: error" in peer.reason
    assert "timed though out of tolerance" in capsys.readouterr().out
    Peer.scale = 1.01
    assert main(["run", *TINY, *against]) == 0, "a peer's failure is not ours"
    record = load(tmp_path / "run.json").records[0]
    assert record.entries["onnxruntime"].status == "invalid" and not record.entries["onnxruntime"].samples
    assert list(record.entries) == [OURS, "torch", "onnxruntime"], "torch.nn is always there"


def test_an_error_while_timing_puts_only_its_contender_out(tmp_path, monkeypatch, quick_ceiling):
    class Tired(FusedRnn):
        def prepare(self, problem):
            runnable = super().prepare(problem)
            timed, left = runnable.time, iter(range(5))

            def time_five_times(calls):
                if next(left, None) is None:
                    raise RuntimeError("too tired")
                return timed(calls)

            runnable.time = time_five_times
            return runnable

    monkeypatch.setattr(registry, "OURS", Tired)
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "gru", "--mode", "infer", "--out", str(out)]) == 1
    entries = load(out).records[0].entries
    assert entries[OURS].status == "failed" and entries[OURS].reason == "RuntimeError: too tired"
    assert entries["torch"].timed


def test_a_case_that_torch_cannot_run_is_left_out(tmp_path, monkeypatch, quick_ceiling):
    def refuse(self):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(TorchNN, "namespace", refuse)
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "gru", "--mode", "infer", "--out", str(out)]) == 0
    results = load(out)
    assert not results.records
    assert results.left_out[0]["reason"] == "torch.nn cannot run it: NotImplementedError: no such kernel"


def test_ctrl_c_keeps_what_is_done(tmp_path, capsys, monkeypatch, quick_ceiling):
    monkeypatch.setattr(registry, "OURS", Impatient)
    monkeypatch.setattr(Impatient, "prepared", 0)
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--out", str(out)]) == 130
    results = load(out)
    assert results.interrupted and len(results.records) == 2
    assert "interrupted" in capsys.readouterr().out


def test_a_real_interrupt_ends_the_command_with_130_and_a_file(tmp_path):
    out = tmp_path / "run.json"
    command = [sys.executable, "-m", "fused_rnn_bench", "run", *TINY, "--suite", "core", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("[2/"):
                break
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "interrupted" in shown
    results = load(out)
    assert results.interrupted and len(results.records) >= 2


def test_what_does_not_fit_is_left_out_and_said(tmp_path, capsys, monkeypatch, quick_ceiling):
    from fused_rnn_bench import runner

    out = tmp_path / "run.json"
    gru = ["--cell", "gru", "--mode", "infer"]
    huge = ["--shape", "1500,32,2816,2816", "--budget", "60", "--out", str(out)]
    monkeypatch.setattr(runner, "available_memory", lambda _: 1 << 50)  # memory is not what is short, here
    assert main(["run", *TINY, *gru, *huge]) == 0
    results = load(out)
    assert len(results.records) == 1 and "of the budget" in results.left_out[0]["reason"]
    assert "Left out (1)" in capsys.readouterr().out
    monkeypatch.setattr(runner, "available_memory", lambda _: 1000)
    assert main(["run", *TINY, *gru, "--budget", "0"]) == 0
    assert "GB of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["run", "--suite", "huge"], "invalid choice: 'huge'"),
        (["run", "--shape", "1,2,3"], "four numbers T,B,I,H"),
        (["run", "--shape", "1,2,3,0"], "'0' should be a positive integer"),
        (["run", "--shape", "1,2,3,x"], "'x' should be a positive integer"),
        (["run", "--shape", "1,2,3,-4"], "'-4' should be a positive integer"),
        (["run", "--cell", "lstm,elman"], "'elman' is none of lstm"),
        (["run", "--dtype", "fp8"], "'fp8' is none of fp32"),
        (["run", "--mode", "dream"], "'dream' is none of infer, train"),
        (["run", "--threads", "0"], "'0' should be a positive integer"),
        (["run", "--budget", "-1"], "'-1' should be a number, 0 or more"),
        (["run", "--budget", "nan"], "'nan' should be a number"),
        (["run", "--against", "keras"], "no peer is called 'keras'"),
        (["run", "--against", "haste"], "--against haste: runs on a GPU only"),
        (["run", "--dtype", "tf32"], "tf32 is a mode of NVIDIA GPUs"),
        (["run", "--graph"], "needs --device cuda"),
        (["run", "--plan", "persistent"], "--plan chooses among the CUDA kernels; it needs --device cuda"),
        (["run", "--plan", "fast"], "invalid choice: 'fast'"),
        (["run", "--suite", "cells", "--cell", "lstm"], "suite cells has lstm_cell infer"),
        (["run", "--layers", "2"], "describe a --shape, and none is given"),
        (["run", "--shape", "1,1,1,1", "--cell", "gru_cell", "--layers", "2"], "for the layers, not for"),
        (["run", "--isa", "mmx"], "--isa mmx"),
        (["run", "--out", "/no/such/folder/run.json"], "there is no such folder"),
        (["run", "--out", "/"], "that is a folder"),
        (["report"], "required"),
        (["compare", "only-one.json"], "required"),
        (["explain", "--cell", "lstm", "--shape", "1,1,1,1"], "--device"),
        (["explain", "--cell", "lstm_cell", "--shape", "1,1,1,1", "--device", "cpu"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_clear_line_and_status_2(capsys, arguments, message):
    if arguments[:1] == ["run"] and "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr()
    assert status == 2 and message in shown.err and "Traceback" not in shown.err and not shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(capsys):
    assert main(["run", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_build_without_fused_rnn_is_an_error(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_rnn", None)
    assert main(["run", *TINY]) == 2
    assert "fused_rnn cannot be imported" in capsys.readouterr().err
    assert main(["explain", "--cell", "gru", "--shape", "5,1,8,8", "--device", "cpu"]) == 2
    assert "cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_explain_shows_the_planner_s_own_plan(capsys, cell, mode):
    from fused_rnn import _C

    options = [
        "--shape",
        "50,32,64,128",
        "--device",
        "cpu",
        "--threads",
        "2",
        "--mode",
        mode,
        "--bidirectional",
    ]
    assert main(["explain", "--cell", cell, *options]) == 0
    planner_cell = {"rnn": "rnn_tanh"}.get(cell, cell)
    plan = _C.cpu_plan(planner_cell, 50, 32, 64, 128, 0, 2, 2, mode == "train")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert plan["why"]
    for name, value in plan.items():
        assert f"{name} {value}" in shown


def test_explain_refuses_what_makes_no_sense(capsys):
    shape = ["--shape", "5,1,8,8"]
    assert main(["explain", "--cell", "gru", *shape, "--device", "cpu", "--proj", "4"]) == 2
    assert main(["explain", "--cell", "lstm", *shape, "--device", "cpu", "--proj", "8"]) == 2
    assert main(["explain", "--cell", "lstm", *shape, "--device", "cpu", "--arch", "sm_90"]) == 2
    assert capsys.readouterr().err.count("fused-rnn-bench: error:") == 3


def test_explain_for_a_gpu_asks_the_cuda_planner_or_says_there_is_none(capsys, monkeypatch):
    from fused_rnn import _C

    options = ["explain", "--cell", "rnn", "--shape", "5,1,8,8", "--device", "cuda", "--arch", "sm_90"]
    asked = {}
    monkeypatch.setattr(
        _C, "plan", lambda **problem: asked.update(problem) or {"tier": "cluster"}, raising=False
    )
    assert main(options) == 0
    assert "cluster" in capsys.readouterr().out
    assert asked["cell"] == "rnn_tanh" and asked["arch"] == "sm_90" and asked["T"] == 5
    monkeypatch.delattr(_C, "plan")
    assert main(options) == 2
    assert "no CUDA planner" in capsys.readouterr().err


def test_a_sample_of_a_tiny_call_is_long_enough_to_measure():
    calls = CpuStopwatch().calibrate(lambda: None, 0.002)
    assert calls > 1000
    slow = CpuStopwatch().calibrate(lambda: time.sleep(0.003), 0.002)
    assert slow == 1
    per_call = Spread.of([CpuStopwatch().time(lambda: time.sleep(0.002), 3) for _ in range(3)]).median
    assert per_call >= 0.002


def test_effort_is_bounded_both_ways():
    effort = Effort(samples=15, seconds=0.2, longest=2.0, least=3, most=200)
    assert not effort.enough([0.1] * 14, 1) and not effort.enough([1e-5] * 50, 100)
    assert effort.enough([0.02] * 15, 1) and effort.enough([2e-5] * 15, 1000)
    assert not effort.enough([25.0] * 2, 1) and effort.enough([25.0] * 3, 1)
    assert effort.enough([1e-6] * 200, 1), (
        "a GPU call of a microsecond is not repeated for a fifth of a second"
    )


def test_contenders_take_turns(monkeypatch, quick_ceiling):
    turns = []
    timed = LocalRunnable.time

    def time_and_note(self, calls):
        turns.append(id(self))
        return timed(self, calls)

    monkeypatch.setattr(LocalRunnable, "time", time_and_note)
    assert main(["run", *TINY, "--cell", "rnn", "--mode", "infer"]) == 0
    rounds = [set(turns[place : place + 2]) for place in range(0, len(turns), 2)]
    assert len(rounds) >= 15 and all(len(pair) == 2 for pair in rounds[:15]), "both in every round"
    assert len({turns[place] for place in range(0, 30, 2)}) == 2, "and not always the same one first"


@pytest.mark.cuda
def test_a_gpu_run_eager_and_captured(tmp_path):
    out = tmp_path / "run.json"
    shape = ["--shape", "6,8,32,32", "--effort", "0", "--against", "torch", "--device", "cuda", "--graph"]
    assert main(["run", *shape, "--dtype", "fp32,tf32,bf16", "--out", str(out)]) == 0
    results = load(out)
    assert {r.case.graph for r in results.records} == {False, True}
    assert all(entry.status == "ok" for r in results.records for entry in r.entries.values())
    assert results.environment["driver"]


def test_the_file_is_json_that_others_can_read(tmp_path, quick_ceiling):
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "rnn", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    entry = data["cases"][0]["contenders"][OURS]
    assert entry["q1_us"] <= entry["median_us"] <= entry["q3_us"]
    assert entry["median_us"] == pytest.approx(Spread.of(entry["samples_us"]).median, abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
