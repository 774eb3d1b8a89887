"""Compares two result files: what got slower or wrong beyond the noise, what got faster, what is gone."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BenchError
from .results import OURS, Record, Results
from .tables import Table

# What the environment must share for times to mean the same.
_COMPARABLE = ("device_name", "threads", "instruction_set", "torch", "driver")


@dataclass(frozen=True)
class Change:
    """One case in both files. `ratio` is new time over old; `noise` is how far it may be from 1 by chance."""

    key: str
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else ""


@dataclass(frozen=True)
class Comparison:
    """Everything that differs between two runs."""

    changes: list[Change]
    broken: list[str]
    only_old: list[str]
    only_new: list[str]
    environment: list[str]

    @property
    def regressed(self) -> bool:
        return bool(self.broken) or any(change.verdict == "slower" for change in self.changes)

    def table(self) -> Table:
        """The changes beyond noise, worst first."""
        marked = [change for change in self.changes if change.verdict]
        marked.sort(key=lambda change: -change.ratio)
        rows = [
            [change.key, f"{change.ratio:.3f}", f"±{change.noise:.1%}", change.verdict] for change in marked
        ]
        bad = frozenset(index for index, change in enumerate(marked) if change.verdict == "slower")
        return Table("Changes beyond noise", ["case", "new / old", "noise", "verdict"], rows, bad)


def compare(old: Results, new: Results, threshold: float, by_speedup: bool) -> Comparison:
    """Compare fused_rnn's time, or its speed-up against torch.nn, case by case.

    The noise of a case is the threshold, or the spread of the two runs where that is larger: the sum of the
    95 % intervals of all the medians involved. Comparing speed-ups cancels what slows the whole machine.
    """
    before = {record.case.key: record for record in old.records}
    after = {record.case.key: record for record in new.records}
    both = [key for key in after if key in before]
    if not both:
        raise BenchError("the two files have no case in common")
    changes, broken = [], []
    for key in both:
        first, second = before[key], after[key]
        if second.failed and not first.failed:
            broken.append(f"{key}: {second.entries[OURS].status}: {second.entries[OURS].reason}")
        elif change := _change(first, second, threshold, by_speedup):
            changes.append(change)
    return Comparison(
        changes,
        broken,
        only_old=[key for key in before if key not in after],
        only_new=[key for key in after if key not in before],
        environment=[
            f"{name}: {old.environment.get(name)} -> {new.environment.get(name)}"
            for name in _COMPARABLE
            if old.environment.get(name) != new.environment.get(name)
        ],
    )


def _change(first: Record, second: Record, threshold: float, by_speedup: bool) -> Change | None:
    names = (OURS, "torch") if by_speedup else (OURS,)
    entries = [record.entries.get(name) for record in (first, second) for name in names]
    if any(entry is None or not entry.timed for entry in entries):
        return None
    noise = max(threshold, sum(entry.spread.notch for entry in entries))
    if by_speedup:
        return Change(first.case.key, first.speedup("torch") / second.speedup("torch"), noise)
    ratio = second.entries[OURS].spread.median / first.entries[OURS].spread.median
    return Change(first.case.key, ratio, noise)
