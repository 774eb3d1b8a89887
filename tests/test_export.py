"""torch.export, and where exported programs go: another length, training, a file, AOTInductor, C++."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity import (
    CLASSES,
    GRU,
    KINDS,
    LSTM,
    LSTM_CELL,
    Kind,
    make_input,
    make_state,
    make_twins,
    run,
    tensors_of,
)
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence

import fused_rnn

# torch's own remarks, about itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes? self"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

ROOT = Path(__file__).parent.parent

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])

DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
SIZES = [(4, 3), (7, 2), (5, 1), (1, 6), (40, 9)]  # T and B; the first is the one at export


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def export(module: nn.Module, *, strict: bool = False, with_hx: bool = True) -> ExportedProgram:
    """With T and B dynamic, wherever they appear."""
    arguments = (make_input(module, *SIZES[0]), make_state(module, SIZES[0][1]) if with_hx else None)
    steps, batch = Dim("steps"), Dim("batch")
    if isinstance(module, nn.RNNCellBase):
        input, state = {0: batch}, {0: batch}
    else:
        input = {0: batch, 1: steps} if module.batch_first else {0: steps, 1: batch}
        state = {1: batch}
    if not with_hx:
        state = None
    elif isinstance(arguments[1], tuple):
        state = (state, state)
    return torch.export.export(module, arguments, dynamic_shapes=(input, state), strict=strict)


def assert_same_at_all_sizes(found, module: nn.Module, with_hx: bool = True) -> None:
    for steps, batch in SIZES:
        x, hx = make_input(module, steps, batch), make_state(module, batch) if with_hx else None
        torch.testing.assert_close(tensors_of(found(x, hx)), tensors_of(module(x, hx)))


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fused_rnn")]


@kinds
@pytest.mark.parametrize("strict, with_hx", [(True, True), (False, True), (False, False)])
def test_export(kind: Kind, strict: bool, with_hx: bool, device: str):
    ours = make_twins(kind, device=device, **({} if kind.is_cell else DEEP)).ours
    program = export(ours, strict=strict, with_hx=with_hx)
    assert_same_at_all_sizes(program.module(), ours, with_hx)
    name = "cell_step" if kind.is_cell else "layer"
    assert operators(program) == [f"fused_rnn.{name}.default"] * (1 if kind.is_cell else 2)


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_lowered(kind: Kind, device: str):
    """What a compiler gets: the operators of the kernels, which keep nothing for a backward pass."""
    ours = make_twins(kind, device=device).ours
    program = export(ours).run_decompositions()
    assert_same_at_all_sizes(program.module(), ours)
    name = "cell_forward" if kind.is_cell else "layer_forward"
    assert operators(program) == [f"fused_rnn.{name}.default"]
    assert [node.args[-1] for node in program.graph.nodes if name in str(node.target)] == [False]


class Rows(nn.Module):
    """A layer of the packed form without its wrapper."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, data: Tensor, batch_sizes: Tensor, hx=None) -> tuple[Tensor, Tensor]:
        output, hn = self.layer(PackedSequence(data, batch_sizes), hx)
        return output.data, hn


@strictness
@pytest.mark.parametrize("with_hx", [True, False], ids="hx={}".format)
def test_export_packed(strict: bool, with_hx: bool, device: str):
    rows = Rows(make_twins(GRU, device=device, num_layers=2, bidirectional=True).ours)

    def arguments(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        hx = make_state(rows.layer, sizes[0]) if with_hx else None
        return torch.randn(sum(sizes), 5, device=device), torch.tensor(sizes), hx

    shapes = ({0: Dim("rows")}, {0: Dim("steps")}, {1: Dim("batch")} if with_hx else None)
    program = torch.export.export(rows, arguments([3, 3, 2, 1]), dynamic_shapes=shapes, strict=strict)
    for sizes in ([3, 3, 2, 1], [2, 1], [5, 5, 5, 4, 4, 2]):
        given = arguments(sizes)
        assert all(map(torch.equal, program.module()(*given), rows(*given)))


@strictness
@pytest.mark.parametrize("kind", [GRU, LSTM_CELL], ids=str)
def test_an_exported_program_trains(kind: Kind, strict: bool, device: str, tmp_path: Path):
    """Also from a file. A gradient that goes missing here would go missing without a word."""
    ours = make_twins(kind, device=device).ours
    program = export(ours, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    x, hx = make_input(ours, 6, 4).requires_grad_(), make_state(ours, 4)
    expected = run(ours, x, hx)
    for module in (program.module(), torch.export.load(tmp_path / "program.pt2").module()):
        found = run(module, x, hx)
        assert len(found) == len(expected)
        for mine, its in zip(found.values(), expected.values(), strict=True):
            assert torch.equal(mine, its)


def test_an_exported_program_is_open_to_transforms_and_compiles(device: str):
    ours = make_twins(LSTM, device=device, dtype=torch.float64).ours
    module = export(ours, with_hx=False).module()
    x, tangent = make_input(ours), make_input(ours)

    def through(function):
        return lambda x: function(x, None)[0].pow(2).sum()

    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.vmap(f, in_dims=1)(x.unsqueeze(-2).repeat(1, 1, 2, 1)),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.hessian(f)(x),
    ):
        torch.testing.assert_close(transform(through(module)), transform(through(ours)))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, None)[0], ours(x)[0])


@strictness
def test_export_under_autocast(strict: bool, device: str):
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_twins(GRU, device=device).ours

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return self.layer(x)[0]

    model, x = Cast(), torch.randn(4, 3, 5, device=device)
    program = torch.export.export(model, (x,), strict=strict)
    found, expected = program.module()(x), model(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_the_model_is_as_it_was(device: str):
    """Exporting leaves no tensor without data in the layer's own bookkeeping."""
    ours = make_twins(LSTM, device=device).ours
    x = make_input(ours)
    expected = ours(x)[0]
    export(ours)
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert torch.equal(copy.deepcopy(ours)(x)[0], expected)


# ------------------------------------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_scripting_names_the_way_out(kind: Kind):
    model = nn.Sequential(nn.Linear(5, 5), make_twins(kind).ours)
    with pytest.raises(RuntimeError, match=rf"fused_rnn\.{kind.cls}\..*fused_rnn\.revert"):
        torch.jit.script(model)
    assert type(model[1]) is kind.ours
    x = torch.randn(3, 5) if kind.is_cell else torch.randn(4, 3, 5)
    scripted = torch.jit.script(fused_rnn.revert(copy.deepcopy(model)))
    torch.testing.assert_close(tensors_of(scripted(x)), tensors_of(model(x)))
    with pytest.raises(RuntimeError, match=r"fused_rnn\.revert"):
        torch.jit.script(model[1])


# ------------------------------------------------------------------------------------- AOTInductor, from Python and C++


class Model(nn.Module):
    """A layer of two directions, a cell, and work of torch's own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = fused_rnn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = fused_rnn.GRUCell(14, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, (hn, _) = self.layers(torch.relu(x))
        return output.tanh(), self.cell(output[:, -1] * 2) + hn[:1, :, :6].squeeze(0)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory):
    """The model and its package, by device; compiled once."""
    made: dict[str, tuple[nn.Module, Path]] = {}

    def package(device: str) -> tuple[nn.Module, Path]:
        if device not in made:
            torch.manual_seed(0)
            model = Model().to(device).eval()
            x = torch.randn(3, 4, 5, device=device)
            program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch"), 1: Dim("steps")},))
            path = tmp_path_factory.mktemp("aoti") / f"{device}.pt2"
            with torch.no_grad(), fresh_cache():
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            made[device] = model, path
        return made[device]

    return package


@pytest.mark.slow
def test_aoti_package(packages, device: str):
    model, path = packages(device)
    loaded = torch._inductor.aoti_load_package(str(path))
    for steps, batch in SIZES:
        x = torch.randn(batch, steps, 5, device=device)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), list(model(x)))


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make -C examples/cpp` makes."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler, and this machine has none")
    if not list(ROOT.glob("build/objects-*/csrc/ops/library.o")):
        pytest.skip("the extension was compiled elsewhere: there are no object files to link")
    made = tmp_path_factory.mktemp("cpp")
    command = ["make", "-C", str(ROOT / "examples" / "cpp"), f"PYTHON={sys.executable}", f"OUT={made}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def run_package(cpp: Path, library: Path, package: Path, inputs: Path, outputs: Path):
    command = [str(path) for path in (cpp / "run_package", library, package, inputs, outputs)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_package_in_cpp(cpp: Path, packages, device: str, tmp_path: Path):
    """A process without Python loads the operators and the package, at a length not seen at export."""
    model, path = packages(device)
    x = torch.randn(2, 11, 5, device=device)
    torch.save([x], tmp_path / "inputs.pt")
    files = path, tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    done = run_package(cpp, cpp / "libfused_rnn.so", *files)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), model(x))


@pytest.mark.slow
def test_package_in_cpp_without_the_operators(cpp: Path, packages, tmp_path: Path):
    """A clear end, not a crash; and so the test above runs our operators."""
    torch.save([torch.randn(2, 11, 5)], tmp_path / "inputs.pt")
    another = Path(torch.__file__).parent / "lib" / "libc10.so"
    done = run_package(cpp, another, packages("cpu")[1], tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    assert done.returncode == 1
    assert "fused_rnn::" in done.stderr


@pytest.mark.slow
def test_the_library_knows_no_python(cpp: Path):
    listed = subprocess.run(["ldd", str(cpp / "libfused_rnn.so")], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert "libtorch_cpu.so" in names
    assert not [name for name in names if "python" in name]
