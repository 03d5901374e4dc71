"""Results as tables: for a terminal (rich), as text, and as JSON values."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text  # Not plain texts: rich would read [s0, 64] as markup.

from fpcompiler.plan import LayerRow

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")
_PLAN_COLUMNS: Final = (
    ("role", 4), ("shape", 5), ("weights", 8), ("activations", 8), ("kernel", 6), ("why", 6),
)  # fmt: skip
CACHE: Final = "cache"
"""The ``op`` of a row of the plan that is a cache of keys and values, not a layer."""

_TEXT_WIDTH: Final = 160  # Of str(): wide enough for the texts of two operands beside each other.


@dataclass(frozen=True)
class PlanTable:
    """What became of each layer.

    Attributes:
        rows: One per layer, in the order of the program.
        scheme: Exact text of the scheme.
        caches: One per cache of keys and values that was to be stored in few bits.
    """

    rows: tuple[LayerRow, ...]
    scheme: str = ""
    caches: tuple[LayerRow, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[LayerRow], scheme: str) -> PlanTable:
        """Return the table of the rows of a plan."""
        layers = tuple(row for row in rows if row.op != CACHE)
        return cls(layers, scheme, tuple(row for row in rows if row.op == CACHE))

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the model as captured."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights in the artifact, scales included."""
        return sum(row.bytes_after for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        rows = {"rows": [asdict(row) for row in self.rows]}
        if self.caches:
            rows["caches"] = [asdict(row) for row in self.caches]
        return {"scheme": self.scheme, **rows, **totals}

    @property
    def cache_text(self) -> str:
        """How many caches are quantized, and their bytes before and after; empty without any."""
        if not self.caches:
            return ""
        quantized = sum(row.quantized for row in self.caches)
        before = size_text(sum(row.bytes_before for row in self.caches))
        after = size_text(sum(row.bytes_after for row in self.caches))
        return f"caches: {quantized} of {len(self.caches)} quantized, {before} -> {after}"

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        quantized = sum(row.quantized for row in self.rows)
        title = Text(self.scheme) if self.scheme else None
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_footer=True)
        ratio = f", {self.bytes_after / self.bytes_before:.3f}x" if self.bytes_before else ""
        total = f"{len(self.rows)} layers, {quantized} quantized{ratio}"
        table.add_column("layer", total, overflow="fold", min_width=9)
        for name, width in _PLAN_COLUMNS:
            table.add_column(name, overflow="fold", min_width=width)
        for name, size in (("before", self.bytes_before), ("after", self.bytes_after)):
            table.add_column(name, size_text(size), justify="right", no_wrap=True)
        table.caption = Text(f"{self.cache_text}, not in the sums") if self.caches else None
        for row in (*self.rows, *self.caches):
            shape = "x".join(map(str, row.shape))
            sizes = size_text(row.bytes_before), size_text(row.bytes_after)
            why = row.reason if row.rule in ("", "base") else f"{row.reason} ({row.rule})"
            kinds = row.weight, row.activation, row.kernel
            texts = (row.name, row.role, shape, *kinds, why, *sizes)
            table.add_row(*map(Text, texts), style=None if row.quantized else "dim")
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.__rich__())


@dataclass(frozen=True)
class CompareRow:
    """How close one layer or output of the compiled model is to the one of the eager model.

    Attributes:
        name: Path of the layer, or name of the output.
        kind: ``layer`` or ``output``.
        sqnr_db: Signal-to-quantization-noise ratio over all batches; None if not compared.
        cosine: Cosine over all batches; None if not compared.
        max_error: Largest absolute difference; None if not compared.
        calls: How many pairs of tensors were compared.
        reason: Why it was not compared, or empty.
    """

    name: str
    kind: str
    sqnr_db: float | None
    cosine: float | None
    max_error: float | None
    calls: int
    reason: str = ""


@dataclass(frozen=True)
class CompareTable:
    """A compiled model against the eager one.

    Attributes:
        rows: The layers in the order of the program, then the outputs.
    """

    rows: tuple[CompareRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; an infinite ratio (no difference at all) is the text ``inf``."""
        return {"rows": [{k: _jsonable(v) for k, v in asdict(row).items()} for row in self.rows]}

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        table = Table("layer or output", "SQNR dB", "cosine", "max error", "calls", "note")
        for column in table.columns[1:5]:
            column.justify = "right"
        for row in self.rows:
            numbers = (row.sqnr_db, row.cosine, row.max_error)
            forms = (".2f", ".6f", ".3g")
            texts = [_number(n, form) for n, form in zip(numbers, forms, strict=True)]
            style = "bold" if row.kind == "output" else "dim" if row.reason else None
            table.add_row(Text(row.name), *texts, str(row.calls), Text(row.reason), style=style)
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.__rich__())


@dataclass(frozen=True)
class VerifyRow:
    """One check of an artifact: ``result`` is ``ok`` or ``failed``."""

    check: str
    result: str
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of an artifact, in the order in which they were made."""

    rows: tuple[VerifyRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.result == "ok" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        table = Table("check", "result", "detail")
        for row in self.rows:
            texts = (Text(row.check), Text(row.result), Text(row.detail))
            table.add_row(*texts, style=None if row.result == "ok" else "red")
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.__rich__())


def as_text(table: RenderableType) -> str:
    """Return a rich table, or what holds some, as plain text without colours."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=_TEXT_WIDTH, color_system=None, force_terminal=False)
    console.print(table)
    return buffer.getvalue().rstrip("\n")


def size_text(count: int) -> str:
    """Return a number of bytes for people: ``1.5 MiB``."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(_UNITS))
    return f"{count / 1024**power:.1f} {_UNITS[power - 1]}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
