"""What the examples print: steps with their seconds, tables, and errors that name the next step."""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from fpcompiler.errors import FpcompilerError
from fpcompiler.options import Options
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.tables import CompareTable

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Shows a bar for a loop: ``for item in track(items, len(items), label)``."""

PIPE_WIDTH = 110
"""Columns when the output goes into a file."""

_PACKAGES = {"PIL": "pillow", "skimage": "scikit-image"}

out = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have."""
    result = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--scheme", default="w4a6", help="a name, or the exact text of a scheme")
    result.add_argument("--folder", type=Path, default=Path("demo"), help="where files are written")
    return result


def artifact(folder: Path, model: str, scheme: str) -> Path:
    """Return the path of an artifact, in a folder that exists then."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{model}-{scheme if re.fullmatch('[a-z0-9_-]+', scheme) else 'custom'}.fpc"


def bytes_before_and_after(model: nn.Module, *artifacts: Path) -> tuple[str, str]:
    """Return the bytes of a model's parameters, shared ones once, and of its artifacts."""
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    return f"{before:,}", f"{sum(path.stat().st_size for path in artifacts):,}"


def heading(text: str) -> None:
    out.print()
    out.print(Text(text, style="bold"))


@contextlib.contextmanager
def step(text: str) -> Iterator[Track]:
    """Show on a terminal that the block is running, and then print the seconds it took.

    Yields:
        What ``fpcompiler.compile`` takes as ``progress``.
    """
    start = time.perf_counter()
    if Options.from_env().shows_progress(sys.stderr):
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(20),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            bars.add_task(text, total=None)
            yield lambda items, total, label: bars.track(items, total=total, description=label)
    else:
        yield lambda items, total, label: items
    out.print(Text.assemble(f"  {text:<66}", (f"{time.perf_counter() - start:6.1f} s", "dim")))
    sys.stdout.flush()


def note(text: str, style: str = "") -> None:
    """Print a paragraph, indented."""
    out.print(Padding(Text(text, style=style), (0, 2)))


def labelled(rows: Sequence[tuple[str, str]]) -> None:
    """Print texts with a label before each."""
    grid = Table.grid(padding=(0, 2))
    for label, text in rows:
        grid.add_row(Text(label, style="dim"), Text(text))
    out.print(Padding(grid, (0, 2)))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> None:
    """Print rows; the first ``left`` columns are texts, the others are aligned to the right."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    for index, header in enumerate(headers):
        justify: Any = "left" if index < left else "right"
        result.add_column(header, justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    out.print(result)


def layer_summary(compiled: CompiledModel, compared: CompareTable, worst: int = 3) -> None:
    """Print the SQNR of the quantized layers (the spread, the worst) and of the results."""
    quantized = {row.name for row in compiled.plan().rows if row.quantized}
    layers = [row for row in compared.rows if row.kind == "layer" and row.name in quantized]
    ratios = {row.name: row.sqnr_db for row in layers if row.sqnr_db is not None}
    lowest = sorted(ratios, key=ratios.__getitem__)[:worst]
    rows = [
        (f"median of {len(ratios)} quantized layers", f"{statistics.median(ratios.values()):.1f}"),
        ("best", f"{max(ratios.values()):.1f}"),
        *((f"worst: {name}", f"{ratios[name]:.1f}") for name in lowest),
    ]
    for row in compared.rows:
        if row.kind == "output" and row.sqnr_db is not None:
            rows.append((f"result {row.name}".removesuffix(" output"), f"{row.sqnr_db:.1f}"))
    table(("output of", "SQNR dB"), rows)
    for row in layers:
        if row.sqnr_db is None:
            note(f"{row.name}: not compared, {row.reason}", "dim")


@contextlib.contextmanager
def required() -> Iterator[None]:
    """End the script with the command to run if an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = error.name or str(error)
        sys.exit(f"error: Python has no {name}. Run: pip install {_PACKAGES.get(name, name)}")


def exit_with(main: Callable[[], int]) -> None:
    """Run a script; an error that a user can mend ends it with its message and exit code 1."""
    try:
        sys.exit(main())
    except FpcompilerError as error:
        sys.exit(f"error: {error}")


def cli() -> str:
    """Return how the command line is called here."""
    command = Path(sys.executable).with_name("fpcompiler")
    if not command.exists():
        return "python -m fpcompiler"
    here = Path.cwd()
    return str(command.relative_to(here) if command.is_relative_to(here) else command)
