"""What the demo char_lm.py shows: the loss curves side by side, the speeds, and a picture of both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

COLORS = {"fused_rnn": "#c2410c", "torch.nn": "#1d4ed8"}

Seconds = Mapping[str, Mapping[str, Sequence[float]]]  # what was timed -> contender -> its repetitions


def loss_table(losses: Mapping[str, Sequence[float]], rows: int = 12) -> Table:
    """The curves side by side, at some steps from first to last."""
    table = Table(title="Loss (nats a character)")
    table.add_column("step", justify="right")
    for name in losses:
        table.add_column(name, justify="right")
    names = list(losses)
    if len(names) == 2:
        table.add_column("difference", justify="right")
    steps = len(losses[names[0]])
    for step in sorted({round(k * (steps - 1) / (rows - 1)) for k in range(rows)}):
        values = [losses[name][step] for name in names]
        cells = [str(step + 1), *(f"{value:.6f}" for value in values)]
        table.add_row(*cells, *([f"{values[0] - values[1]:+.1e}"] if len(values) == 2 else []))
    return table


def speed_table(seconds: Seconds) -> Table:
    """Medians, with the middle half of the repetitions; the speed-up is the ratio of the medians."""
    table = Table(title="Time in ms: median (middle half), measured in turn")
    table.add_column("")
    names = list(next(iter(seconds.values())))
    for name in names:
        table.add_column(name, justify="right")
    if len(names) == 2:
        table.add_column("speed-up", justify="right")
    for what, by_name in seconds.items():
        cells = [what, *(_spread(by_name[name]) for name in names)]
        table.add_row(*cells, *([f"{speed_up(by_name):.2f} x"] if len(names) == 2 else []))
    return table


def speed_up(by_name: Mapping[str, Sequence[float]]) -> float:
    ours, theirs = by_name.values()
    return statistics.median(theirs) / statistics.median(ours)


def _spread(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return f"{1e3 * seconds[0]:.3g}"
    low, middle, high = (1e3 * quartile for quartile in statistics.quantiles(seconds, n=4))
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def show_sample(console: Console, text: str, name: str) -> None:
    console.rule(f"text written by the model trained with {name}")
    console.print(text, markup=False, highlight=False)
    console.rule()


def picture(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], characters_per_second: Mapping[str, float]
):
    """Saves both curves and both throughputs as a PNG."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 1), layout="constrained")
    for (name, values), width in zip(
        losses.items(), (3.5, 1.2), strict=False
    ):  # the second lies on the first
        curves.plot(range(1, len(values) + 1), values, label=name, color=COLORS[name], linewidth=width)
    curves.set(xlabel="training step", ylabel="loss (nats a character)", title=title)
    curves.grid(alpha=0.3)
    curves.legend()
    names = list(characters_per_second)
    drawn = bars.bar(names, list(characters_per_second.values()), color=[COLORS[name] for name in names])
    bars.bar_label(drawn, fmt="{:,.0f}")
    bars.set(title="characters trained a second")
    bars.margins(y=0.1)
    figure.savefig(path, dpi=130)
    plt.close(figure)
