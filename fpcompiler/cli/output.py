"""Output of the commands: tables, JSON and progress.

Results go to stdout. Progress goes to stderr, and only to a terminal unless ``FPC_PROGRESS=1``.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from fpcompiler.options import Options

__all__ = [
    "Row", "Track", "print_json", "print_table", "print_rich", "markdown_table", "records",
    "progress",
]  # fmt: skip

_PIPE_WIDTH: Final = 1000
"""Columns of a table that nobody watches: wide enough that no cell is folded for a script."""

Row: TypeAlias = Sequence[object]
Track: TypeAlias = Callable[[Iterable[Any], int, str], Iterable[Any]]


def print_json(data: Any) -> None:
    """Print data for a script."""
    print(json.dumps(data, indent=2))


def print_table(title: str, headers: Sequence[str], rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(headers),
    )
    for index, header in enumerate(headers):
        table.add_column(header, justify=_justify(rows, index), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    print_rich(table)


def print_rich(table: Any) -> None:
    """Print a table of rich: in colour and fitted to the window on a terminal, plain otherwise."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    buffer = io.StringIO()
    Console(file=buffer, width=_PIPE_WIDTH, color_system=None).print(table)
    print("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()))


def _justify(rows: Sequence[Row], index: int) -> Any:
    numbers = all(isinstance(row[index], int | float) for row in rows)
    return "right" if rows and numbers else "left"


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def markdown_table(headers: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table as Markdown."""
    lines = [headers, ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


@contextlib.contextmanager
def progress(text: str) -> Iterator[Track]:
    """Show that something is going on while the block runs.

    Yields:
        A function that shows a bar for a loop: ``for item in track(items, len(items), label)``.
    """
    if not Options.from_env().shows_progress(sys.stderr):
        yield _without_bar
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=sys.stderr.isatty()) as bars:
        bars.add_task(text, total=None)
        yield lambda items, total, label: bars.track(items, total=total, description=label)


def _without_bar(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return items


def records(headers: Sequence[str], rows: Sequence[Row]) -> list[Mapping[str, object]]:
    """Return the rows of a table as JSON records."""
    keys = [header.replace(" ", "_") for header in headers]
    return [dict(zip(keys, row, strict=True)) for row in rows]
