"""The benchmark's peers: each is wired so that it computes what torch.nn computes.

ONNX Runtime and OpenVINO are optional; their tests say so when they skip. Haste and FlashRNN need a GPU, so
what is tested here of them is how they refuse, and FlashRNN's layout against its documented formulas.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from fused_rnn_bench.case import CELLS, LAYERS, Case
from fused_rnn_bench.parity import Judge
from fused_rnn_bench.peers.base import Contender
from fused_rnn_bench.peers.engines import OnnxRuntime, OpenVino, _Worker
from fused_rnn_bench.peers.flashrnn import FlashRnn, flashrnn_call
from fused_rnn_bench.peers.haste import Haste
from fused_rnn_bench.peers.modules import TorchNN
from fused_rnn_bench.peers.registry import PEERS
from fused_rnn_bench.problem import make_problem

ENGINES = [
    pytest.param(
        engine,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(package) is None for package in engine.packages),
            reason=f"an optional peer that is not installed: {', '.join(engine.packages)}",
        ),
        id=engine.name,
    )
    for engine in (OnnxRuntime, OpenVino)
]


def judge_of(problem) -> Judge:
    return Judge(problem, TorchNN("cpu", 1).prepare(problem).outputs())


@pytest.fixture(params=ENGINES)
def engine(request):
    contender = request.param("cpu", 1)
    yield contender
    contender.close()


def test_an_engine_computes_what_torch_computes(engine):
    cases = [Case(cell, "infer", "fp32", "cpu", 3, 5, 6, 8) for cell in LAYERS]
    cases += [Case(cell, "infer", "fp32", "cpu", 2, 5, 6, 8) for cell in CELLS if cell not in LAYERS]
    cases += [Case(cell, "infer", "fp32", "cpu", 9, 5, 6, 8, 2, True, lengths) for cell in LAYERS
              for lengths in ("dense", "varied")]  # fmt: skip
    for case in cases:
        problem = make_problem(case)
        runnable = engine.prepare(problem)
        verdict = judge_of(problem).judge(runnable.outputs(), must_have_all=False)
        # An engine may round a little more than torch.nn; a gate in the wrong place is off by thousands.
        assert verdict.ratio < 10, f"{case.key}: {verdict}"
        assert set(runnable.outputs()) >= {"h_n"}


def test_an_engine_is_timed_in_a_process_of_its_own(engine):
    runnable = engine.prepare(make_problem(Case("lstm", "infer", "fp32", "cpu", 5, 2, 8, 8)))
    calls = runnable.calibrate(0.05)
    assert calls > 1 and runnable.time(calls) > 0
    assert runnable.settings() == {"threads": 1}


def test_an_engine_s_error_comes_back_as_one(engine):
    problem = make_problem(Case("lstm", "infer", "fp32", "cpu", 5, 2, 8, 8))
    del problem.weights["weight_hh_l0"]
    with pytest.raises(RuntimeError, match="weight_hh_l0"):
        engine.prepare(problem)


def test_a_worker_that_crashed_is_an_error_and_no_more():
    """Closing it with a request half sent must not fail, for that would end the run."""
    worker = _Worker("ort_session")
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RuntimeError, match="its process ended with status -9"):
        worker.ask("prepare", b" " * 2**22)
    assert not worker.alive()
    worker.close()


@pytest.mark.parametrize("peer", [OnnxRuntime, OpenVino])
def test_engines_refuse_training_and_gpus(peer):
    assert "CPU" in peer("cuda", 1).missing()
    assert "inference only" in peer("cpu", 1).refuses(Case("lstm", "train", "fp32", "cpu", 1, 1, 1, 1))
    assert "no fp64" in peer("cpu", 1).refuses(Case("lstm", "infer", "fp64", "cpu", 1, 1, 1, 1))
    large = Case("lstm", "infer", "fp32", "cpu", 1, 1, 9000, 9000)
    assert "too large" in peer("cpu", 1).refuses(large)
    assert peer("cpu", 1).refuses(Case("lstm", "infer", "fp32", "cpu", 1, 1, 1, 1)) is None


@pytest.mark.parametrize("peer", [Haste, FlashRnn])
def test_gpu_peers_refuse_what_they_do_not_have(peer):
    contender = peer("cuda", 1)
    dtype = "fp32" if peer is Haste else "bf16"
    assert peer("cpu", 1).missing() == "runs on a GPU only"
    assert "has no rnn_relu" in contender.refuses(Case("rnn_relu", "infer", dtype, "cuda", 1, 1, 1, 1))
    assert "one layer" in contender.refuses(Case("lstm", "infer", dtype, "cuda", 1, 1, 1, 1, layers=2))
    assert "packed" in contender.refuses(Case("lstm", "infer", dtype, "cuda", 1, 2, 1, 1, lengths="equal"))
    assert contender.refuses(Case("gru", "train", dtype, "cuda", 1, 1, 1, 1)) is None


def test_every_peer_is_registered_under_its_name():
    assert list(PEERS) == ["torch", "onnxruntime", "openvino", "haste", "flashrnn"]
    for name, peer in PEERS.items():
        assert issubclass(peer, Contender) and peer.name == name


def flashrnn_by_its_formulas(wx, r, b, function, backend, dtype):
    """FlashRNN's documented recurrence: Wx [B, T, G, N, D], R [G, N, D (out), D (in)], b [G, N, D]."""
    del backend, dtype
    batch, time, _, heads, size = wx.shape
    h = torch.zeros(batch, heads, size)
    c = torch.zeros_like(h)
    states = []
    for step in range(time):
        ry = torch.einsum("gndp,bnp->bgnd", r, h)
        x = wx[:, step]
        if function == "lstm":
            i, f, z, o = (x + ry + b).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
        elif function == "gru":
            g = ry[:, 0] + b[0]
            reset = (x[:, 0] + ry[:, 1] + b[1]).sigmoid()
            z = (x[:, 1] + ry[:, 2] + b[2]).sigmoid()
            h = z * h + (1 - z) * (x[:, 2] + b[3] + reset * g).tanh()
        else:
            h = (x[:, 0] + ry[:, 0] + b[0]).tanh()
        states.append(torch.stack((h, c)) if function == "lstm" else h[None])
    every = torch.stack(states, 2)
    return every, every[:, :, -1:]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_flashrnn_is_given_torch_s_weights_in_its_own_layout(monkeypatch, cell, mode):
    stand_in = types.ModuleType("flashrnn")
    stand_in.flashrnn = flashrnn_by_its_formulas
    monkeypatch.setitem(sys.modules, "flashrnn", stand_in)
    problem = make_problem(Case(cell, mode, "fp32", "cpu", 7, 3, 4, 8))
    prepared = flashrnn_call(problem, "vanilla", "float32")
    named = prepared.collect(prepared.call())
    verdict = judge_of(problem).judge(named, must_have_all=False)
    assert verdict.ratio < 10, verdict
    expected = {"output", "h_n"} | ({"c_n"} if cell == "lstm" else set())
    if mode == "train":
        expected |= {"grad input", "grad weight_ih_l0", "grad weight_hh_l0"}
    assert set(named) == expected
