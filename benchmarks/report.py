"""Prints results as tables for a terminal, with rich. markdown.py writes the same ones as text."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import tables
from .compare import Comparison
from .results import Results
from .tables import Table

_DISPENSABLE = ("note", "MB torch", "MB", "TFLOP/s", "us a step", "cases", "at", "dtype")
_FEW = 12


def print_report(results: Results, console: Console) -> None:
    """Everything about one run, to a terminal."""
    console.print(Text(tables.environment_line(results), style="bold"))
    console.print(Text(tables.ceiling_line(results)))
    if warning := tables.load_warning(results):
        console.print(Text(warning, style="yellow"))
    for table in (tables.case_table(results), tables.mean_table(results)):
        if table.rows:
            _print_table(table, console)
    _print_list(console, tables.LOOSE, tables.loose(results), "yellow")
    _print_list(console, "Left out", tables.left_out(results), "yellow")
    _print_list(console, "Failed", tables.failures(results), "bold red")


def _print_table(table: Table, console: Console) -> None:
    """Print a table; what a narrow terminal has no room for is left out, the least needed columns first."""
    kept, dropped = _fitting(table, console.width)
    rich = RichTable(
        title=table.title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index in kept:
        column = table.columns[index]
        rich.add_column(
            column, justify="left" if column in tables.TEXT else "right", no_wrap=column != "case"
        )
    for number, row in enumerate(table.rows):
        rich.add_row(*(Text(row[index]) for index in kept), style="red" if number in table.bad else None)
    console.print(rich)
    if dropped:
        console.print(Text(f"not shown on a terminal this narrow: {', '.join(dropped)}", style="dim"))


def _fitting(table: Table, width: int) -> tuple[list[int], list[str]]:
    """The indices of the columns that fit into this width, and the names of the others."""
    needed = [2 + max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    kept, dropped = list(range(len(needed))), []
    for name in _DISPENSABLE:
        if sum(needed[index] for index in kept) + 2 <= width:
            break
        if name in table.columns:
            kept.remove(table.columns.index(name))
            dropped.append(name)
    return kept, dropped


def _print_list(console: Console, heading: str, lines: list[str], style: str) -> None:
    if not lines:
        return
    console.print(Text(f"{heading} ({len(lines)}):", style=style))
    shown = lines if heading == "Failed" else lines[:_FEW]
    for line in shown:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(shown) < len(lines):
        console.print(Text(f"  and {len(lines) - len(shown)} more"))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What changed between two runs."""
    for line in comparison.environment:
        console.print(Text(f"the environments differ: {line}", style="yellow"))
    table = comparison.table()
    if table.rows:
        _print_table(table, console)
    _print_list(console, "Failed in the new run only", comparison.broken, "bold red")
    _print_list(console, "Only in the old file", comparison.only_old, "yellow")
    _print_list(console, "Only in the new file", comparison.only_new, "yellow")
    slower = sum(change.verdict == "slower" for change in comparison.changes)
    faster = sum(change.verdict == "faster" for change in comparison.changes)
    console.print(
        Text(
            f"{len(comparison.changes)} cases compared: {slower} slower, {faster} faster, "
            f"{len(comparison.broken)} newly failed",
            style="bold red" if comparison.regressed else "bold green",
        )
    )


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """The planner's answer, its reasons last."""
    rich = RichTable(show_header=False)
    rich.add_column(style="bold")
    rich.add_column(overflow="fold")
    for name in sorted(plan, key=lambda name: name == "why"):
        rich.add_row(Text(name), Text(str(plan[name])))
    console.print(rich)
