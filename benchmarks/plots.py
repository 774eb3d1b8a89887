"""The pictures of a run, as PNG files: speed-up by shape, and the roofline."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .case import MODES
from .cost import Ceiling, compulsory_bytes, flops
from .errors import BenchError
from .results import OURS, Record, Results
from .tables import number, threads

# Hues that colour-blind readers tell apart (Okabe and Ito); a cell shares its layer's, with another marker.
_COLOURS = {"lstm": "#0072B2", "gru": "#D55E00", "rnn": "#009E73", "rnn_relu": "#CC79A7"}
_MARKERS = {True: "o", False: "s"}
_MODE_TITLES = {
    "infer": "inference",
    "train": "training (forward and backward)",
    "penalty": "training with a gradient penalty",
}


def save_plots(results: Results, folder: Path, stem: str) -> list[Path]:
    """Write the pictures of one run, one pair for each dtype, and return their paths."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in dict.fromkeys(record.case.dtype for record in results.records):
            timed = [record for record in results.records if record.case.dtype == dtype and record.timed]
            for kind, draw in (("speedup", _speedup), ("roofline", _roofline)):
                figure = draw(results, timed, dtype)
                if figure is None:
                    continue
                path = folder / f"{stem}-{kind}-{dtype}.png"
                figure.savefig(path, dpi=130)
                written.append(path)
    except OSError as error:
        raise BenchError(f"cannot write plots to {folder}: {error.strerror}") from error
    return written


def _style(cell: str) -> tuple[str, str]:
    layer = cell.removesuffix("_cell")
    return _COLOURS[layer], _MARKERS[layer == cell]


def _finish(axes: Axes) -> None:
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _subtitle(results: Results, dtype: str) -> str:
    env = results.environment
    where = f", {threads(env.get('threads'))}" if env.get("device") == "cpu" else ""
    return f"{env.get('device_name')}{where}, {dtype}, torch {env.get('torch')}, commit {env.get('commit')}"


def _speedup(results: Results, records: list[Record], dtype: str) -> Figure | None:
    """A panel for each peer and mode that were measured, a row for each shape, a dot for each cell; 1 is the peer's
    speed."""
    panels = {}
    for peer in results.peers:
        for mode in MODES:
            of_both = [r for r in records if r.case.mode == mode and r.speedup(peer) is not None]
            if of_both:
                panels[peer, mode] = of_both
    if not panels:
        return None
    shapes = list(dict.fromkeys(record.case.shape for record in records))[::-1]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.4 + 3.6 * columns, 1.3 + (0.6 + 0.26 * len(shapes)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, ((peer, mode), of_both) in zip(grid.flat, panels.items(), strict=False):
        _speedup_panel(axes, of_both, peer, shapes)
        axes.set_title(f"against {peer}, {_MODE_TITLES[mode]}", fontsize=9, loc="left")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    # One scale for all panels, wide enough for every dot, so that they can be read against each other.
    speedups = [record.speedup(peer) for (peer, _), of_both in panels.items() for record in of_both]
    grid[0, 0].set_xlim(min(0.7, min(speedups) / 1.2), max(2.0, max(speedups) * 1.2))
    for axes in grid[-1]:
        axes.set_xlabel("times faster (log scale)", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("T x B x H", fontsize=9)
    figure.suptitle(f"Speed-up of fused_rnn\n{_subtitle(results, dtype)}", fontsize=10, x=0.01, ha="left")
    _legend(figure, records)
    return figure


def _speedup_panel(axes: Axes, records: list[Record], peer: str, shapes: list[str]) -> None:
    for record in records:
        colour, marker = _style(record.case.cell)
        row = shapes.index(record.case.shape)
        axes.plot(record.speedup(peer), row, marker, color=colour, markersize=6, alpha=0.9)
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes.set_ylim(-0.6, len(shapes) - 0.4)
    axes.tick_params(axis="x", labelsize=8)
    _finish(axes)


def _roofline(results: Results, records: list[Record], dtype: str) -> Figure | None:
    """Operations a second against operations a byte of compulsory traffic, under the measured roof."""
    if not records or dtype not in results.ceiling.matmul:
        return None
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    axes = figure.subplots()
    intensities = []
    for record in records:
        case, seconds = record.case, record.entries[OURS].spread.median
        intensity = flops(case) / compulsory_bytes(case)
        intensities.append(intensity)
        colour, marker = _style(case.cell)
        face = colour if case.mode == "infer" else "none"
        axes.plot(
            intensity, flops(case) / seconds / 1e12, marker, color=colour, markerfacecolor=face, markersize=7
        )
    _draw_roof(axes, results.ceiling, dtype, min(intensities) / 2, max(intensities) * 2)
    axes.set_xlabel("operations a byte of compulsory traffic", fontsize=9)
    axes.set_ylabel("TFLOP/s", fontsize=9)
    axes.set_title(
        f"Roofline of fused_rnn: filled marks inference, open marks training\n{_subtitle(results, dtype)}",
        fontsize=10,
        loc="left",
    )
    _finish(axes)
    _legend(figure, records)
    return figure


def _draw_roof(axes: Axes, ceiling: Ceiling, dtype: str, low: float, high: float) -> None:
    """The matmul rate, and one slope for the slowest and the fastest measured copy (memory, cache)."""
    peak = ceiling.matmul[dtype]
    rates = sorted({min(rate for _, rate in ceiling.copy), max(rate for _, rate in ceiling.copy)})
    for rate, line in zip(rates, ("-", "--"), strict=False):
        knee = min(max(peak / rate, low), high)
        points = [low, knee, high]
        axes.plot(points, [min(peak, rate * x) / 1e12 for x in points], line, color="#555555", linewidth=1.2)
        axes.annotate(
            f"copy {number(rate / 1e9)} GB/s", (low, min(peak, rate * low) / 1e12),
            xytext=(3, 4), textcoords="offset points", fontsize=8, color="#555555",
        )  # fmt: skip
    axes.annotate(
        f"matrix product {number(peak / 1e12)} TFLOP/s", (high, peak / 1e12),
        xytext=(-3, 4), textcoords="offset points", ha="right", fontsize=8, color="#555555",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")


def _legend(figure: Figure, records: list[Record]) -> None:
    handles = []
    for cell in dict.fromkeys(record.case.cell for record in records):
        colour, marker = _style(cell)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=cell))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
