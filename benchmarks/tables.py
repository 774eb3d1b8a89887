"""The rows of the report as text: a table of cases and one of means, for the terminal and for Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cost import flops
from .results import OURS, Entry, Record, Results
from .stats import geometric_mean

# Columns of words, which stand on the left; the others hold numbers.
TEXT = frozenset({"cell", "mode", "dtype", "T x B x H", "against", "at", "note", "by", "by, forced"})

# The heading over the lines of `loose`.
LOOSE = "Peers marked ~, timed though out of tolerance"

# The share of the cores that other programs may use before the times are called into question.
_BUSY = 0.5


@dataclass(frozen=True)
class Table:
    """A heading, the columns, and rows of text; `bad` holds the indices of rows that report a failure."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    bad: frozenset[int] = frozenset()


def case_table(results: Results) -> Table:
    """One row a case: our time, how near the ceiling it is, how much faster than each peer, and memory."""
    peers = results.peers
    with_memory = any(entry.memory for record in results.records for entry in record.entries.values())
    columns = ["cell", "mode", "dtype", "T x B x H", "ms", "us a step", "TFLOP/s", "ceiling"]
    columns += [f"x {peer}" for peer in peers]
    with_penalty = any(_times_training(record) is not None for record in results.records)
    columns += ["/ train"] if with_penalty else []
    columns += ["MB", "MB torch"] if with_memory else []
    with_peak = any(
        "peak_bytes" in (entry.memory or ())
        for record in results.records
        for entry in record.entries.values()
    )
    columns += ["peak MB", "peak MB torch"] if with_peak else []
    with_notes = any(record.case.note for record in results.records)
    columns += ["note"] if with_notes else []
    rows, bad = [], set()
    for index, record in enumerate(results.records):
        if record.failed:
            bad.add(index)
        row = _case_row(record, results, peers)
        if with_penalty:
            times = _times_training(record)
            row.append("-" if times is None else f"{times:.2f}")
        if with_memory:
            row += [_megabytes(record.entries.get(name), "bytes") for name in (OURS, "torch")]
        if with_peak:
            row += [_megabytes(record.entries.get(name), "peak_bytes") for name in (OURS, "torch")]
        if with_notes:
            row.append(record.case.note)
        rows.append(row)
    return Table("Cases", columns, rows, frozenset(bad))


def _times_training(record: Record) -> float | None:
    return record.entries[OURS].times_training if OURS in record.entries else None


def _case_row(record: Record, results: Results, peers: list[str]) -> list[str]:
    case = record.case
    row = [case.cell, case.mode, case.dtype, case.shape]
    ours = record.entries.get(OURS)
    if ours is not None and ours.timed:
        spread = ours.spread
        row += [
            f"{number(spread.median * 1e3)} ±{spread.relative:.0%}",
            number(spread.median * 1e6 / case.T),
            number(flops(case) / spread.median / 1e12),
            _part_of_ceiling(results, record, spread.median),
        ]
    else:
        row += [ours.status.upper() if ours is not None else "-", "-", "-", "-"]
    return row + [_against(record, peer) for peer in peers]


def _against(record: Record, peer: str) -> str:
    """The speed-up against a peer, or why there is none."""
    entry = record.entries.get(peer)
    speedup = record.speedup(peer)
    if speedup is not None:
        return f"{speedup:.2f}{'~' if entry.status == 'loose' else ''}"
    if entry is None or entry.status == "refused":
        return "-"
    return number(entry.spread.median * 1e3) + " ms" if entry.timed else entry.status


def _part_of_ceiling(results: Results, record: Record, seconds: float) -> str:
    if record.case.dtype not in results.ceiling.matmul:
        return "-"
    return f"{results.ceiling.seconds(record.case) / seconds:.0%}"


def _megabytes(entry: Entry | None, which: str) -> str:
    count = entry.memory.get(which) if entry is not None and entry.memory else None
    return "-" if count is None else number(count / 1e6)


def mean_table(results: Results) -> Table:
    """Geometric mean and lowest case of the speed-up, by cell and mode and peer."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in results.records:
        launch = " graph" if record.case.graph else ""
        groups.setdefault((record.case.cell, record.case.mode, record.case.dtype + launch), []).append(record)
    rows = []
    for (cell, mode, dtype), records in groups.items():
        for peer in results.peers:
            speedups = [(record.speedup(peer), record.case.shape) for record in records]
            known = [(value, shape) for value, shape in speedups if value is not None]
            if known:
                lowest, shape = min(known)
                mean = geometric_mean(value for value, _ in known)
                rows.append([cell, mode, dtype, peer, str(len(known)), f"{mean:.2f}", f"{lowest:.2f}", shape])
    columns = ["cell", "mode", "dtype", "against", "cases", "geometric mean", "lowest", "at"]
    return Table("Speed-up of fused_rnn", columns, rows)


def plan_table(chosen: Results, forced: Results) -> Table:
    """One row for each case with a time in both runs: the planner's choice of kernels, and what `--plan` made of it."""
    others = {record.case.key: record for record in forced.records if record.timed}
    rows = []
    for record in chosen.records:
        other = others.get(record.case.key)
        if not record.timed or other is None:
            continue
        ours, theirs = record.entries[OURS], other.entries[OURS]
        speedup = other.speedup("torch")
        row = [record.case.cell, record.case.mode, record.case.dtype, record.case.shape]
        for entry in (ours, theirs):
            row += [number(entry.spread.median * 1e6), _strategies(entry)]
        row.append(f"{ours.spread.median / theirs.spread.median:.2f}")
        rows.append([*row, "-" if speedup is None else f"{speedup:.2f}"])
    columns = [
        "cell",
        "mode",
        "dtype",
        "T x B x H",
        "us",
        "by",
        "us, forced",
        "by, forced",
        "x faster forced",
    ]
    return Table("The planner's choice and the strategy forced", [*columns, "x torch, forced"], rows)


def _strategies(entry: Entry) -> str:
    """By which kernels it ran: one name where both passes have the same."""
    names = [entry.settings[name] for name in ("strategy", "backward_strategy") if name in entry.settings]
    return ", ".join(dict.fromkeys(names)) or "-"


def failures(results: Results) -> list[str]:
    """One line for each contender that was out of tolerance or raised an error, fused_rnn and peers alike."""
    return _with_status(results, "invalid", "failed")


def loose(results: Results) -> list[str]:
    """One line for each peer that was timed although less accurate than the tolerance law asks."""
    return _with_status(results, "loose")


def _with_status(results: Results, *statuses: str) -> list[str]:
    return [
        f"{record.case.key}: {name} {entry.status}: {entry.reason}"
        for record in results.records
        for name, entry in record.entries.items()
        if entry.status in statuses
    ]


def left_out(results: Results) -> list[str]:
    """One line for each reason why cases were left out."""
    lines = [f"{line['case']}: {line['reason']}" for line in results.left_out]
    return lines + (["interrupted: the cases after this point were not run"] if results.interrupted else [])


def environment_line(results: Results) -> str:
    """Where the figures come from, in one line."""
    env = results.environment
    parts = [
        env.get("device_name"),
        threads(env.get("threads")) if env.get("device") == "cpu" else f"driver {env.get('driver')}",
        env.get("instruction_set") if env.get("device") == "cpu" else None,
        f"torch {env.get('torch')}",
        f"commit {env.get('commit')}",
        env.get("date"),
    ]
    return ", ".join(str(part) for part in parts if part)


def threads(count: object) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'' if count == 1 else 's'}"


def load_warning(results: Results) -> str:
    """A warning when other programs kept the machine busy, or nothing."""
    load, cores = results.environment.get("load_average"), results.environment.get("cores")
    if not isinstance(load, (int, float)) or not isinstance(cores, int) or load < _BUSY * cores:
        return ""
    return f"the machine was busy when the run began (load {load:.1f} on {cores} cores): mistrust the times"


def ceiling_line(results: Results) -> str:
    """The roof that the column `ceiling` is a part of."""
    rates = [f"{dtype} {number(rate / 1e12)} TFLOP/s" for dtype, rate in results.ceiling.matmul.items()]
    copies = [rate / 1e9 for _, rate in results.ceiling.copy]
    copy = number(copies[0]) if len(copies) == 1 else f"{number(min(copies))} to {number(max(copies))}"
    return f"ceiling: matrix product {', '.join(rates)}; copy {copy} GB/s"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
