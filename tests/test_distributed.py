"""Two processes on the CPU train what one would: DistributedDataParallel, FSDP2, nn.DataParallel's replicas, and
examples/train_lm.py under torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import CLASSES, GRU, LSTM, LSTM_PROJ, Kind, tensors_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PROCESSES, BATCH, STEPS, ROUNDS = 2, 6, 5, 3


@dataclass(frozen=True)
class Case:
    """A model with one recurrent layer, or cell, in the middle."""

    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None  # of the rows of the whole batch: packs them

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return "-".join([str(self.kind), *words, *(["packed"] if self.lengths else [])])


BOTH_WAYS = {"num_layers": 2, "bidirectional": True}
CASES = [Case(kind) for kind in CLASSES] + [
    Case(LSTM_PROJ, BOTH_WAYS),
    Case(GRU, BOTH_WAYS, lengths=(5, 2, 4, 1, 5, 3)),
    Case(LSTM, {"bias": False}, lengths=(3, 5, 2, 4, 4, 1)),
]
WRAPPERS = ("DDP", "FSDP2")

cases = pytest.mark.parametrize("case", CASES, ids=str)


class Model(nn.Module):
    """Its sizes are odd, so that FSDP2 cuts the weights into shards of unequal size."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.before = nn.Linear(3, 5)
        self.recurrent = case.kind.ours(5, 7, **{**case.kind.options, **case.options})
        width = getattr(self.recurrent, "proj_size", 0) or 7
        self.after = nn.Linear(width * (2 if case.options.get("bidirectional") else 1), 2)
        self.double()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.before(x)
        if self.case.kind.is_cell:
            state, outputs = None, []
            for step in x:
                state = self.recurrent(step, state)
                outputs.append(tensors_of(state)[0])
            output = torch.stack(outputs)
        elif lengths is not None:
            output, _ = self.recurrent(pack_padded_sequence(x, lengths, enforce_sorted=False))
            output, _ = pad_packed_sequence(output, total_length=STEPS)
        else:
            output, _ = self.recurrent(x)
        return self.after(output)


def batch_of(case: Case, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, 3, dtype=torch.float64, generator=generator)
    wanted = torch.randn(STEPS, BATCH, 2, dtype=torch.float64, generator=generator)
    return x[:, rows], wanted[:, rows], torch.tensor(case.lengths)[rows] if case.lengths else None


def whole(tensor: Tensor) -> Tensor:
    """A copy; of a tensor of FSDP2 all of it, gathered from the processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model: nn.Module, x: Tensor, wanted: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
    """Losses and gradients of every round, and the weights after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    found = {}
    for step in range(ROUNDS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x, lengths), wanted)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        for name, weight in model.named_parameters():
            found[f"gradient {step} {name.removeprefix('module.')}"] = whole(weight.grad)
        optimizer.step()
    weights = {name.removeprefix("module."): whole(weight) for name, weight in model.named_parameters()}
    return found | weights


def _process(rank: int, folder: Path) -> None:
    """One of the two: trains every case under every wrapper on its half of the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    half = BATCH // PROCESSES
    found = {}
    for case in CASES:
        batch = batch_of(case, slice(rank * half, (rank + 1) * half))
        found[f"DDP {case}"] = train(DistributedDataParallel(Model(case)), *batch)
        sharded = Model(case)
        fully_shard(sharded.recurrent, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert isinstance(sharded.recurrent, FSDPModule) and isinstance(sharded.recurrent, case.kind.ours)
        for weight in sharded.parameters():
            assert weight.to_local().numel() < weight.numel()
        found[f"FSDP2 {case}"] = train(sharded, *batch)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each process found. They start once, for importing torch takes longer than all their work."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_process, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.slow
@cases
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_one(halves, case: Case, wrapper: str):
    expected = train(Model(case), *batch_of(case))
    first, second = (half[f"{wrapper} {case}"] for half in halves)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("loss"):
            assert first[name] != second[name]  # each saw rows of its own
            torch.testing.assert_close((first[name] + second[name]) / 2, value, rtol=1e-12, atol=0)
        else:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-13)
    assert not torch.equal(expected["loss 0"], expected["loss 1"])


# ------------------------------------------------------------------------------------------------------- replicas


def _copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]


@cases
def test_replicas(case: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    """nn.DataParallel's replicate: replicas compute with the copies they are given, and gradients flow back through
    these. Copying itself is stood in for, because torch does it between GPUs only."""
    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", _copies)
    model = Model(case).to(device)
    x, wanted, lengths = batch_of(case)
    x, wanted = x.to(device), wanted.to(device)
    nn.functional.mse_loss(model(x, lengths), wanted).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()

    replicas = nn.parallel.replicate(model, [0, 1])
    parts = zip(
        replicas,
        x.chunk(2, 1),
        wanted.chunk(2, 1),
        lengths.chunk(2) if lengths is not None else (None, None),
        strict=True,
    )
    losses = [nn.functional.mse_loss(replica(x, lengths), wanted) for replica, x, wanted, lengths in parts]
    loss = sum(losses) / 2
    copies = [
        weight
        for replica in replicas
        for part in replica.modules()
        for weight in part._former_parameters.values()
    ]
    assert len(copies) == 2 * len(expected)
    torch.autograd.grad(loss, copies, retain_graph=True)  # raises if a replica computed with another weight
    loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-10, atol=1e-13)


# ------------------------------------------------------------------------------------------------------- torchrun

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--hidden", "16", "--layers", "2", "--batch", "4", "--length", "8", "--every", "2"]
TEXT = "the cat sat on the mat\n" * 9  # a pass is six steps: in the seventh the state starts anew


@pytest.fixture
def train_lm(monkeypatch: pytest.MonkeyPatch):
    """The example's module, imported as its own folder sees it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_lm

    yield train_lm
    for name in ("train_lm", "char_lm_parts"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return ["--text", str(path)]


def torchrun(*arguments: str) -> str:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(PROCESSES),
    ]
    done = subprocess.run(
        [*launch, str(EXAMPLES / "train_lm.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt")


def assert_same_bits(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same_bits(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same_bits(*pair)
    else:
        assert a == b


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_example_resumes_exactly(train_lm, text: list[str], cell: str, tmp_path: Path, capsys):
    """In one process: to the last bit what it would have been."""
    common = [*SMALL, *text, "--cell", cell]
    train_lm.main([*common, "--steps", "8", "--out", str(tmp_path / "straight")])
    train_lm.main([*common, "--steps", "3", "--out", str(tmp_path / "stopped")])
    assert len(checkpoint(tmp_path / "stopped")["losses"]) == 3
    train_lm.main([*common, "--steps", "8", "--out", str(tmp_path / "stopped")])
    straight, stopped = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "stopped")
    assert_same_bits(straight, stopped)
    assert len(set(straight["losses"])) == 8
    assert capsys.readouterr().out.count("step 8: loss") == 2
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow
def test_example_under_torchrun(train_lm, text: list[str], tmp_path: Path):
    """Two processes resume exactly too, and take one process's steps; one goes on where two stopped."""
    common = [*SMALL, *text]
    told = torchrun(*common, "--steps", "8", "--out", str(tmp_path / "straight"))
    assert told.count("step 8: loss") == 1
    torchrun(*common, "--steps", "3", "--out", str(tmp_path / "stopped"))
    handed_over = tmp_path / "handed over"
    handed_over.mkdir()
    (handed_over / "checkpoint.pt").write_bytes((tmp_path / "stopped" / "checkpoint.pt").read_bytes())
    torchrun(*common, "--steps", "8", "--out", str(tmp_path / "stopped"))
    straight = checkpoint(tmp_path / "straight")
    assert_same_bits(straight, checkpoint(tmp_path / "stopped"))

    train_lm.main([*common, "--steps", "8", "--out", str(tmp_path / "alone")])
    train_lm.main([*common, "--steps", "8", "--out", str(handed_over)])
    for folder in ("alone", "handed over"):
        other = checkpoint(tmp_path / folder)
        torch.testing.assert_close(other["losses"], straight["losses"], rtol=1e-5, atol=0)
        for part, shared in zip(other["state"], straight["state"], strict=True):
            torch.testing.assert_close(part, shared, rtol=0, atol=1e-4)


def test_example_refuses_another_runs_checkpoint(train_lm, text: list[str], tmp_path: Path):
    train_lm.main([*SMALL, *text, "--steps", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="of another run"):
        train_lm.main([*SMALL, *text, "--steps", "2", "--seed", "1", "--out", str(tmp_path)])


@pytest.mark.parametrize("option", ["hidden", "layers", "steps", "batch", "length", "every", "rate"])
def test_example_refuses_zeros(train_lm, option: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        train_lm.main([f"--{option}", "0", "--out", str(tmp_path / "new")])
    assert caught.value.code == 2
    assert f"argument --{option}: 0 is not above zero" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
