"""The results of the benchmark: measured cells, their record, and tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from examples.benchmarks.cpu_linear.bars import Verdict, verdicts
from examples.benchmarks.cpu_linear.peers import BASELINE
from examples.benchmarks.cpu_linear.problem import Peer
from examples.benchmarks.cpu_linear.timing import Timing, speed


@dataclass(frozen=True)
class Measured:
    """What is kept of a candidate.

    Attributes:
        timing: Its seconds.
        error: The relative error of its result; None if it has none.
        weight_bytes: Bytes of the weight that one product reads.
        copies: Copies of the weight that it went through.
    """

    timing: Timing
    error: float | None
    weight_bytes: int
    copies: int

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "microseconds": significant(1e6 * self.timing.median),
            "noisy": self.timing.is_noisy,
            "rounds_microseconds": [significant(1e6 * value) for value in self.timing.seconds],
            "rounds_clean": [int(clean) for clean in self.timing.clean],
            "relative_error": significant(self.error),
            "weight_bytes": self.weight_bytes,
            "copies": self.copies,
        }


@dataclass(frozen=True)
class Cell:
    """All candidates on one shape, with some rows of input and some threads.

    Attributes:
        shape: ``(N, K)`` of the weight.
        rows: Rows of the input.
        threads: How many threads a product uses.
        measured: The candidates by name.
        missing: Why a candidate was not measured.
    """

    shape: tuple[int, int]
    rows: int
    threads: int
    measured: Mapping[str, Measured]
    missing: Mapping[str, str]

    def ratio(self, name: str) -> float | None:
        """Return the speed of a candidate relative to torch bf16, if both were measured."""
        if name not in self.measured or BASELINE not in self.measured:
            return None
        return speed(self.measured[name].timing, self.measured[BASELINE].timing).ratio

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts on the bars about this cell."""
        timings = {name: measured.timing for name, measured in self.measured.items()}
        return verdicts(self.shape, self.rows, timings)

    def record(self) -> list[dict[str, Any]]:
        """Return one row for each candidate."""
        where = {"shape": list(self.shape), "rows": self.rows, "threads": self.threads}
        rows: list[dict[str, Any]] = []
        for name, measured in self.measured.items():
            ratio = significant(self.ratio(name))
            rows.append({**where, "peer": name, "speed_to_torch_bf16": ratio, **measured.record()})
        rows += [{**where, "peer": name, "missing": why} for name, why in self.missing.items()]
        return rows


def significant(value: float | None) -> float | None:
    """Return a number with four digits."""
    return None if value is None else float(f"{value:.4g}")


def speeds(cells: Sequence[Cell], peers: Sequence[Peer]) -> Table:
    """Return the table of one shape and number of threads: microseconds and speeds."""
    n, k = cells[0].shape
    table = Table(
        title=f"{n} x {k}, threads: {cells[0].threads}; microseconds (speed to {BASELINE})"
    )
    table.add_column("", no_wrap=True)
    for cell in cells:
        table.add_column(f"M={cell.rows}", justify="right")
    for peer in peers:
        table.add_row(peer.title, *(_text(cell, peer.name) for cell in cells))
    return table


def _text(cell: Cell, name: str) -> str:
    if name not in cell.measured:
        return "-"
    timing, ratio = cell.measured[name].timing, cell.ratio(name)
    noisy = "*" if timing.is_noisy else ""
    against = "" if ratio is None else f" ({ratio:.2f})"
    return f"{significant(1e6 * timing.median):g}{noisy}{against}"


def promises(cells: Sequence[Cell]) -> Table:
    """Return the table of the bars."""
    table = Table(title="Bars: how many times as fast")
    for name in ("shape", "M", "thr", "scheme", "against"):
        table.add_column(name, no_wrap=True)
    for name in ("wanted", "got", "ok"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in bar_records(cells):
        n, k = row["shape"]
        noisy = "*" if row["noisy"] else ""
        measured = "-" if row["measured"] is None else f"{row['measured']:.3g}{noisy}"
        table.add_row(
            f"{n}x{k}", str(row["rows"]), str(row["threads"]), row["scheme"], row["against"],
            f"{row['wanted']:g}", measured, "yes" if row["passed"] else "no",
        )  # fmt: skip
    return table


def bar_records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return one row for each bar and cell that it is about."""
    return [
        {
            "shape": list(cell.shape),
            "rows": cell.rows,
            "threads": cell.threads,
            "scheme": verdict.bar.scheme,
            "against": verdict.bar.peer,
            "wanted": verdict.bar.wanted,
            "measured": verdict.measured and significant(verdict.measured.ratio),
            "noisy": verdict.measured is not None and verdict.measured.is_noisy,
            "passed": verdict.is_passed,
        }
        for cell in cells
        for verdict in cell.verdicts()
    ]


def missing(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each candidate and shape that was not measured."""
    lines = [
        f"{name} on {cell.shape[0]} x {cell.shape[1]}: {why}"
        for cell in cells
        for name, why in cell.missing.items()
    ]
    return list(dict.fromkeys(lines))
