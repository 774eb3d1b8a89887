"""Shows a run as it goes: a line a case in a log, a progress bar on a terminal if rich is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from .case import Case
from .results import OURS, Record


class Log:
    """A line for each case on stderr. Use as a context manager around the run, as the bar too."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """A word on what is being done before the cases start."""

    def started(self, case: Case) -> None:
        pass

    def finished(self, case: Case, record: Record | None, left_out: str) -> None:
        self._count += 1
        line = f"[{self._count}/{self._total}] {case.cell} {case.mode} {case.dtype} {case.shape}: "
        if record is None:
            self._print(line + f"left out, {left_out}")
        elif record.failed:
            entry = record.entries[OURS]
            self._print(line + f"{entry.status.upper()}: {entry.reason}")
        else:
            self._done(line, record)

    def _done(self, line: str, record: Record) -> None:
        self._print(line + _times(record))

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar(Log):
    """A progress bar that leaves lines only for the cases that went wrong."""

    def __init__(self, total: int) -> None:
        from rich import progress
        from rich.console import Console

        super().__init__(total)
        self._console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def started(self, case: Case) -> None:
        self.say(f"{case.cell} {case.mode} {case.dtype} {case.shape}".ljust(40))

    def finished(self, case: Case, record: Record | None, left_out: str) -> None:
        super().finished(case, record, left_out)
        self._bar.update(self._task, advance=1)

    def _done(self, line: str, record: Record) -> None:
        pass

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_progress(total: int) -> Log:
    """The bar where someone watches it, else the log."""
    return Bar(total) if sys.stderr.isatty() and find_spec("rich") else Log(total)


def _times(record: Record) -> str:
    times = [
        f"{name} {entry.spread.median * 1e6:.1f} us" if entry.timed else f"{name} {entry.status}"
        for name, entry in record.entries.items()
    ]
    return ", ".join(times)
