"""`fused-rnn-bench run --mode penalty`: a training step with a second derivative."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fused_rnn_bench.case import Case
from fused_rnn_bench.cli import main
from fused_rnn_bench.cost import compulsory_bytes, flops, memory_needed
from fused_rnn_bench.parity import torch_outputs
from fused_rnn_bench.peers import registry
from fused_rnn_bench.peers.flashrnn import FlashRnn
from fused_rnn_bench.peers.haste import Haste
from fused_rnn_bench.peers.modules import TorchNN
from fused_rnn_bench.problem import make_problem
from fused_rnn_bench.results import OURS, load
from fused_rnn_bench.suites import SUITES, cases
from test_bench_run import TINY, Wrong
from test_bench_run import quick_ceiling as quick_ceiling

pytestmark = pytest.mark.usefixtures("quick_ceiling")


def test_a_step_is_measured_beside_one_without_a_penalty(tmp_path, capsys):
    out = tmp_path / "run.json"
    more = ["--cell", "lstm,gru,rnn,gru_cell", "--dtype", "fp32,fp64", "--mode", "train,penalty"]
    assert main(["run", *TINY, *more, "--out", str(out)]) == 0
    results = load(out)
    assert len(results.records) == 16
    for record in results.records:
        ours, theirs = record.entries[OURS], record.entries["torch"]
        assert ours.status == theirs.status == "ok" and ours.parity["ok"] and theirs.times_training is None
        if record.case.mode == "train":
            assert ours.times_training is None and not ours.training_samples
        else:
            assert ours.times_training > 1 and len(ours.training_samples) == len(ours.samples) >= 15
    shown = capsys.readouterr().out
    heading = next(line for line in shown.splitlines() if "x torch" in line)
    assert "/ train" in heading
    assert f"{results.records[1].entries[OURS].times_training:.2f}" in shown

    data = json.loads(out.read_text())
    entry = data["cases"][1]["contenders"][OURS]
    assert entry["times_training"] == pytest.approx(results.records[1].entries[OURS].times_training, abs=1e-3)
    entry["training_samples_us"][0] = -1
    out.write_text(json.dumps(data))
    assert main(["report", str(out)]) == 2
    assert "a training sample" in capsys.readouterr().err


def test_other_modes_have_no_such_column(capsys):
    assert main(["run", *TINY, "--cell", "rnn"]) == 0
    shown = capsys.readouterr().out
    assert "infer" in shown and "train" in shown and "penalty" not in shown and "/ train" not in shown


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_cell"])
def test_the_gradients_are_those_of_the_loss_with_its_penalty(cell):
    problem = make_problem(Case(cell, "penalty", "fp64", "cpu", 3, 2, 4, 5))
    found = torch_outputs(problem, torch.float64)
    plain = torch_outputs(replace(problem, case=replace(problem.case, mode="train")), torch.float64)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in found if not name.startswith("grad"))

    def squares(x: torch.Tensor) -> torch.Tensor:
        other = replace(problem, x=x, case=replace(problem.case, mode="train"))
        gradients = torch_outputs(other, torch.float64).items()
        return sum(g.square().sum() for name, g in gradients if name.startswith("grad"))

    step = torch.zeros_like(problem.x)
    step[1, 1, 2] = 1e-6
    slope = (squares(problem.x + step) - squares(problem.x - step)) / 2e-6
    more = found["grad input"] - plain["grad input"]
    torch.testing.assert_close(more[1, 1, 2], slope, rtol=1e-6, atol=1e-8)


def test_a_wrong_second_derivative_fails_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "OURS", Wrong)
    assert main(["run", *TINY, "--cell", "lstm", "--mode", "penalty"]) == 1
    assert "grad input: error" in capsys.readouterr().out


def test_what_torch_cannot_differentiate_twice_is_left_out(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("Double backwards is not supported")

    monkeypatch.setattr(TorchNN, "namespace", refuse)
    out = tmp_path / "run.json"
    assert main(["run", *TINY, "--cell", "gru", "--mode", "penalty", "--out", str(out)]) == 0
    assert "Double backwards is not supported" in load(out).left_out[0]["reason"]


def test_what_is_trained_can_be_penalized():
    def of(mode: str) -> list[tuple]:
        found = cases(SUITES["deepbench"], device="cpu", dtypes=["fp32"], modes=[mode])
        return [(case.cell, case.T, case.B, case.H) for case in found]

    assert of("penalty") == of("train") != of("infer")
    case = Case("lstm", "train", "fp32", "cpu", 5, 2, 3, 4)
    penalty = replace(case, mode="penalty")
    assert 3 * flops(penalty) == 11 * flops(case) and compulsory_bytes(penalty) == compulsory_bytes(case)
    assert memory_needed(penalty) > memory_needed(case)
    for peer, dtype in ((Haste, "fp32"), (FlashRnn, "bf16")):
        assert "second derivative" in peer("cuda", 1).refuses(replace(penalty, device="cuda", dtype=dtype))
