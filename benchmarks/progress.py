"""Shows a run as it goes: a progress bar on a terminal, a line a case in a log."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .case import Case
from .results import OURS, Record


class RunProgress:
    """Use as a context manager around the run."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._count = 0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A word on what is being done before the cases start."""
        self._bar.update(self._task, description=text)

    def started(self, case: Case) -> None:
        self._bar.update(
            self._task, description=f"{case.cell} {case.mode} {case.dtype} {case.shape}".ljust(40)
        )

    def finished(self, case: Case, record: Record | None, left_out: str) -> None:
        self._count += 1
        self._bar.update(self._task, advance=1)
        line = f"[{self._count}/{self._total}] {case.cell} {case.mode} {case.dtype} {case.shape}: "
        if record is None:
            self._print(line + f"left out, {left_out}")
        elif record.failed:
            entry = record.entries[OURS]
            self._print(line + f"{entry.status.upper()}: {entry.reason}")
        elif not self._console.is_terminal:
            self._print(line + _one_line(record))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _one_line(record: Record) -> str:
    times = [
        f"{name} {entry.spread.median * 1e6:.1f} us" if entry.timed else f"{name} {entry.status}"
        for name, entry in record.entries.items()
    ]
    return ", ".join(times)
