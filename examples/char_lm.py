"""Demo: train one character-level language model twice, with fused_rnn and with torch.nn, and compare.

    python examples/char_lm.py --out out

The text is the language reference that comes with Python itself (pydoc_data.topics). Both models start from
the same seed and see the same batches, step by step and in turn, so that the losses can be compared number by
number and the times fairly. A third copy takes the first steps in float64: it shows what rounding alone does.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import char_lm_report as report
import torch
from char_lm_parts import CharModel, Contender, Text, generate, interleaved, layers_alone, positive, read_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fused_rnn

OURS, THEIRS, EXACT = "fused_rnn", "torch.nn", "float64"
EXACT_STEPS = (
    25  # taken by the float64 copy. Training is chaotic: later, differences grow whatever their cause
)
SMOOTHING = 20
WARM_UP_STEPS = 5  # not timed


def contender(name: str, library: ModuleType, options: argparse.Namespace, characters: int) -> Contender:
    """A fresh model. It sets the seed itself, so that every contender starts from the same weights."""
    torch.manual_seed(options.seed)
    model = CharModel(library, options.cell, characters, options.hidden, options.layers)
    if name == EXACT:
        model.double()
    return Contender(name, model, torch.optim.Adam(model.parameters(), lr=options.rate))


def train(contenders: Sequence[Contender], text: Text, options: argparse.Namespace, console: Console) -> None:
    """Every step is taken by each contender in turn, the first place alternating."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    batches = text.batches(options.batch, options.length)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.steps, losses="")
        for step in range(options.steps):
            inputs, targets, fresh = next(batches)
            running = [one for one in contenders if one.name != EXACT or step < EXACT_STEPS]
            for one in running if step % 2 == 0 else reversed(running):
                if fresh:
                    one.state = None
                one.train_step(inputs, targets)
            losses = "  ".join(f"{one.name} {one.losses[-1]:.4f}" for one in running if one.name != EXACT)
            progress.update(task, advance=1, losses=losses)


def largest(values: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of two curves, as far as both go; NaN if they hold one, which max() may skip."""
    steps = min(len(values), len(others))
    pair = torch.tensor([values[:steps], others[:steps]], dtype=torch.float64)
    return (pair[0] - pair[1]).abs().max().item()


def check_rounding(ours: Sequence[float], theirs: Sequence[float], exact: Sequence[float]) -> str:
    """The tolerance law: our largest error against float64 is at most twice torch's, plus one rounding."""
    our_error, their_error = largest(ours, exact), largest(theirs, exact)
    allowed = 2 * their_error + torch.finfo(torch.float32).eps * max(map(abs, exact))
    told = (
        f"first {len(exact)} steps against float64: {OURS} errs by {our_error:.1e},"
        f" {THEIRS} by {their_error:.1e}, allowed {allowed:.1e}"
    )
    if not our_error <= allowed:  # in this order NaN fails
        raise SystemExit(f"the losses differ by more than rounding explains: {told}")
    return told


def check_curves(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """After the first steps the trainings drift apart, but as curves they must stay the same.

    Averaged over a few steps they may differ by no more than the loss moves from one batch to the next.
    """
    gap = largest(smoothed(ours), smoothed(theirs))
    noise = statistics.median(abs(b - a) for a, b in itertools.pairwise(theirs))
    told = (
        f"all {len(ours)} steps: the curves differ by at most {gap:.1e} (means of {SMOOTHING} steps),"
        f" and the loss moves by {noise:.1e} from batch to batch"
    )
    if not gap <= noise:
        raise SystemExit(f"the loss curves part: {told}")
    return told


def smoothed(losses: Sequence[float]) -> list[float]:
    starts = range(0, len(losses), SMOOTHING)
    return [statistics.fmean(losses[start : start + SMOOTHING]) for start in starts]


def measure(contenders: Sequence[Contender], options: argparse.Namespace, console: Console) -> report.Seconds:
    """Times of the training steps taken, of the layers alone, and of writing one character."""
    with console.status("timing the layers alone and the writing of text"):
        layers = interleaved(
            {one.name: layers_alone(one.model, options.batch, options.length) for one in contenders}, 15
        )
        written = 50
        writing = interleaved(
            {one.name: lambda one=one: generate(one.model, written) for one in contenders}, 9
        )
    skipped = min(WARM_UP_STEPS, options.steps - 1)
    return {
        "training step": {one.name: one.seconds[skipped:] for one in contenders},
        f"{options.cell} both ways": layers,
        "a character written": {name: [s / written for s in seconds] for name, seconds in writing.items()},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a character model with fused_rnn and with torch.nn.")
    count = positive(int)
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM", type=str.upper)
    parser.add_argument("--hidden", type=count, default=256, help="units a layer (default: %(default)s)")
    parser.add_argument("--layers", type=count, default=1, help="default: %(default)s")
    parser.add_argument("--steps", type=count, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=32, help="texts side by side (default: %(default)s)")
    parser.add_argument("--length", type=count, default=64, help="characters a step (default: %(default)s)")
    parser.add_argument("--rate", type=positive(float), default=5e-3, help="Adam's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=count, help="default: torch's own choice")
    parser.add_argument("--text", type=Path, help="a file to learn instead of Python's language reference")
    parser.add_argument(
        "--sample", type=count, default=600, help="characters to write (default: %(default)s)"
    )
    parser.add_argument("--no-compare", action="store_true", help="fused_rnn only")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture (default: out)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    text = Text(read_text(options.text))
    options.out.mkdir(parents=True, exist_ok=True)

    libraries = (
        {OURS: fused_rnn} if options.no_compare else {OURS: fused_rnn, THEIRS: torch.nn, EXACT: torch.nn}
    )
    contenders = [
        contender(name, library, options, len(text.alphabet)) for name, library in libraries.items()
    ]
    timed = [one for one in contenders if one.name != EXACT]
    size = f"{options.layers} x {options.hidden} units, {options.batch} x {options.length} characters"
    title = f"{options.cell}, {size} a step"
    console.print(
        f"{title}; {len(text.numbers):,} characters of text, {len(text.alphabet)} different ones;"
        f" {torch.get_num_threads()} threads"
    )
    train(contenders, text, options, console)

    losses = {one.name: one.losses for one in timed}
    seconds = measure(timed, options, console)
    console.print(report.loss_table(losses))
    sample = generate(timed[0].model, options.sample, seed=options.seed)
    report.show_sample(console, text.decode(sample), OURS)
    console.print(report.speed_table(seconds))
    steps = seconds["training step"]
    characters = options.batch * options.length
    rates = {name: characters / statistics.median(times) for name, times in steps.items()}
    report.picture(options.out / "char_lm.png", title, losses, rates)
    console.print(f"picture of the curves and the throughput: {options.out / 'char_lm.png'}")
    if not options.no_compare:
        ours, theirs, exact = (one.losses for one in contenders)
        console.print(f"agreement, {check_rounding(ours, theirs, exact)}")
        if options.steps > 1:
            console.print(f"agreement, {check_curves(ours, theirs)}")


if __name__ == "__main__":
    main()
