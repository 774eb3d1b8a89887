"""What each verb of the command does. torch, rich and matplotlib are imported only where they are needed."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .case import Case
from .errors import BenchError
from .results import Results, load
from .suites import SUITES, THREE, Line, cases

if TYPE_CHECKING:
    from rich.console import Console

OK = 0
FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def _console() -> Console:
    """The console for tables. In a pipe or a log it is as wide as the widest row."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _show(results: Results, title: str = "") -> None:
    """All of it, as Markdown where rich is not installed: a bare machine can measure all the same."""
    if find_spec("rich"):
        from .report import print_report

        console = _console()
        if title:
            console.rule(title, align="left")
        print_report(results, console)
    else:
        from .markdown import markdown

        print(f"## {title}\n\n" * bool(title) + markdown(results))


def run(options: argparse.Namespace) -> int:
    """Measure, show, and save if asked."""
    import torch

    from .ceiling import measure_ceiling
    from .environment import describe
    from .peers import registry
    from .progress import run_progress
    from .runner import Runner
    from .timing import Effort

    device = _device(options.device)
    todo = _cases(options, device)
    _check_writable(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ours = registry.OURS(device, torch.get_num_threads())
    if reason := ours.missing():
        raise BenchError(reason)
    _set_isa(options.isa)
    peers = registry.choose_peers(options.against, device, torch.get_num_threads())
    contenders = [ours, *peers]
    try:
        with _forced(options.plan), run_progress(len(todo)) as progress:
            ceiling = measure_ceiling(device, {case.dtype: None for case in todo}, progress.say)
            results = Results(describe(device, contenders), _settings(options), ceiling)
            effort = Effort(seconds=options.effort)
            Runner(contenders, effort, _budget(options)).run(todo, results, progress)
    finally:
        for contender in contenders:
            contender.close()
    if options.out is not None:
        results.save(options.out)
    _show(results)
    if results.interrupted:
        return INTERRUPTED
    return FAILED if any(record.failed for record in results.records) else OK


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device here")
    return name


def _cases(options: argparse.Namespace, device: str) -> list[Case]:
    """The cases that the options ask for; at least one, or it is an error that says why there is none."""
    dtypes = options.dtype or (["bf16", "tf32"] if device == "cuda" else ["fp32"])
    if device == "cpu" and "tf32" in dtypes:
        raise BenchError("--dtype tf32 is a mode of NVIDIA GPUs; on a CPU use fp32")
    if device == "cpu" and options.graph:
        raise BenchError("--graph captures CUDA graphs; it needs --device cuda")
    if device == "cpu" and options.plan:
        raise BenchError("--plan chooses among the CUDA kernels; it needs --device cuda")
    suite = options.suite or (None if options.shape else "quick")
    lines = [
        Line(tuple(options.cell or THREE), *sizes, layers=options.layers,
             bidirectional=options.bidirectional, lengths=options.lengths)
        for sizes in options.shape
    ]  # fmt: skip
    for line in lines:
        if any(cell.endswith("_cell") for cell in line.cells) and _more_than_a_cell(options):
            raise BenchError("--layers, --bidirectional and --lengths are for the layers, not for the cells")
    if not lines and _more_than_a_cell(options):
        raise BenchError("--layers, --bidirectional and --lengths describe a --shape, and none is given")
    if suite is not None:
        lines = [*lines, *SUITES[suite]]
    found = cases(
        lines, device=device, dtypes=dtypes, modes=options.mode, only_cells=options.cell, graph=options.graph
    )
    todo = list({case.key: case for case in found}.values())
    if not todo:
        offered = dict.fromkeys(
            f"{cell} {mode}" for line in lines for cell in line.cells for mode in line.modes
        )
        raise BenchError(f"no case matches; suite {suite} has {', '.join(offered)}")
    return todo


def _more_than_a_cell(options: argparse.Namespace) -> bool:
    return options.layers > 1 or options.bidirectional or options.lengths != "dense"


def _budget(options: argparse.Namespace) -> float | None:
    """Seconds that the cases may take, or None for no limit."""
    if options.budget is None:
        quick = options.suite == "quick" or not (options.suite or options.shape)
        return 120.0 if quick else 900.0
    return options.budget or None


def _check_writable(out: Path | None) -> None:
    """Find out before an hour of measuring, not after, that the result has nowhere to go."""
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        raise BenchError(f"--out {out}: {'that is a folder' if out.is_dir() else 'there is no such folder'}")
    probe = out.with_name(out.name + ".part")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BenchError(f"cannot write {out}: {error.strerror}") from error


def _set_isa(name: str | None) -> None:
    if name is None:
        return
    from fused_rnn import _C

    try:
        _C.set_isa(name)
    except ValueError as error:
        raise BenchError(f"--isa {name}: {error}") from error


def _forced(plan: str | None) -> AbstractContextManager[None]:
    """Our layers take this strategy wherever it can run; nobody else knows of it."""
    if plan is None:
        return nullcontext()
    import fused_rnn

    return fused_rnn.force_plan(plan)


def _settings(options: argparse.Namespace) -> dict[str, object]:
    """The options of the run, for the result file."""
    skipped = ("command", "out")
    return {name: value for name, value in vars(options).items() if name not in skipped}


def report(options: argparse.Namespace) -> int:
    """Show saved results."""
    loaded = [(path, load(path)) for path in options.files]
    if options.markdown is not None:
        from .markdown import markdown

        text = "\n".join(f"## {path.stem}\n\n{markdown(results)}" for path, results in loaded)
        _write_text(options.markdown, text)
    else:
        for path, results in loaded:
            _show(results, path.name)
    if options.plots is not None:
        from .plots import save_plots

        for path, results in loaded:
            for written in save_plots(results, options.plots, path.stem):
                print(written, file=sys.stderr)
    return OK


def _write_text(path: Path, text: str) -> None:
    if str(path) == "-":
        print(text, end="")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from error


def compare(options: argparse.Namespace) -> int:
    """Say what changed; status 1 when something got slower or wrong."""
    from .compare import compare as compare_results
    from .report import print_comparison

    old, new = load(options.old), load(options.new)
    comparison = compare_results(old, new, options.threshold / 100, options.by == "speedup")
    print_comparison(comparison, _console())
    return FAILED if comparison.regressed else OK


def explain(options: argparse.Namespace) -> int:
    """Show the plan for one shape."""
    from .explain import explain as plan_for
    from .report import print_plan

    threads = options.threads
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    plan = plan_for(
        options.cell,
        options.shape,
        device=options.device,
        dtype=options.dtype,
        training=options.mode == "train",
        projection=options.proj,
        directions=2 if options.bidirectional else 1,
        threads=threads,
        arch=options.arch,
    )
    print_plan(plan, _console())
    return OK
