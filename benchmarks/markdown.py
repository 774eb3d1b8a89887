"""The tables of tables.py as Markdown, which is also what is printed where rich is not installed."""

from __future__ import annotations

from . import tables
from .results import Results
from .tables import Table


def markdown(results: Results) -> str:
    """Everything about one run."""
    parts = [tables.environment_line(results), tables.ceiling_line(results), tables.load_warning(results)]
    parts = [part for part in parts if part]
    for table in (tables.mean_table(results), tables.case_table(results)):
        if table.rows:
            parts += [f"### {table.title}", markdown_table(table)]
    lists = ((tables.LOOSE, tables.loose), ("Left out", tables.left_out), ("Failed", tables.failures))
    for heading, lines in ((heading, lines_of(results)) for heading, lines_of in lists):
        if lines:
            parts += [f"### {heading}", "\n".join(f"- {_escape(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    rule = ["---" if column in tables.TEXT else "---:" for column in table.columns]
    rows = [table.columns, rule, *([_escape(cell) for cell in row] for row in table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
