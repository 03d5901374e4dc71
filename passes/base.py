"""What a pass is.

A pass is a frozen dataclass: its options are its fields, so it compares, prints and parses. It
keeps no state; whatever it learns goes into the program or the :class:`PassContext`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Final, TypeVar

from torch import Tensor
from torch_mlir import ir

from fpcompiler.calibration import Calibration
from fpcompiler.errors import PassError
from fpcompiler.ir.program import Program, Stage

Item = TypeVar("Item")

_PLAIN: Final = re.compile(r"[\w.+-]+")


def _no_progress(items: Iterable[Item], total: int, label: str) -> Iterable[Item]:
    return items


@dataclass(frozen=True)
class StoredWeight:
    """The weight of a layer as a checkpoint has it.

    Attributes:
        packed: Packed codes, uint8 ``[N, bytes]``.
        scales: As :func:`fpcompiler.numerics.quantize` returns them.
        input_outer: The static scale of the input's tensor, fp32 ``[1, 1]``, or None.
    """

    packed: Tensor
    scales: tuple[Tensor, ...]
    input_outer: Tensor | None = None


@dataclass
class PassContext:
    """What a pass may report while it runs.

    Attributes:
        statistics: Counts by name, shown in the pass table: ``context.count("layers quantized")``.
        progress: Wraps an iterable for a progress bar: ``progress(items, total, label)``.
        calibration: The calibration data, if there is any; see :meth:`calibrated`.
        stored: Weights that exist as codes already, by layer; see ``stored-weights``.
        reports: Texts for people, in Markdown: what the pass had to choose among, for instance.
            They are in the dumps, in the artifact's recipe, and printed by the command line.
    """

    statistics: Counter[str] = field(default_factory=Counter)
    progress: Callable[[Iterable[Item], int, str], Iterable[Item]] = _no_progress
    calibration: Calibration | None = None
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)

    def calibrated(self, name: str) -> Calibration:
        """Return the calibration data for a pass that cannot do without.

        Raises:
            PassError: If there is none.
        """
        if self.calibration is None:
            raise PassError(
                f"{name} needs calibration data: compile(..., calibration=batches), where each "
                "batch is a tensor, a tuple of arguments or a dict of keyword arguments."
            )
        return self.calibration

    def count(self, what: str, number: int = 1) -> None:
        """Add to a statistic."""
        self.statistics[what] += number


@dataclass(frozen=True)
class Pass(ABC):
    """One step from program to program.

    Class attributes:
        name: How the pass is called in a pipeline text; also the name of its file.
        requires: The stage that the program must be at; None: any.
        ensures: The stage that the program is at afterwards; None: unchanged.
    """

    name: ClassVar[str]
    requires: ClassVar[Stage | None] = None
    ensures: ClassVar[Stage | None] = None

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> None:
        """Change the program in place. The module's context is current."""


def pass_text(item: Pass) -> str:
    """Return the text of one pass: its name, and the options that differ from their defaults."""
    changed = [f for f in fields(item) if getattr(item, f.name) != f.default]
    options = " ".join(f"{f.name}={_quote(getattr(item, f.name))}" for f in changed)
    return f"{item.name}{{{options}}}" if options else item.name


def _quote(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def rewrite(
    program: Program,
    names: Sequence[str],
    pattern: Callable[[ir.Operation], Sequence[ir.Value] | None],
) -> int:
    """Apply a pattern to every operation with one of the names, in program order.

    The pattern may create operations: the insertion point is before the matched operation and the
    location is its own. It returns the values that replace the results, or None for no match.

    Returns:
        How many operations matched.
    """
    matched = 0
    for op in program.operations(*names):
        with ir.InsertionPoint(op), op.location:
            values = pattern(op)
        if values is None:
            continue
        for old, new in zip(op.results, values, strict=True):
            old.replace_all_uses_with(new)
        op.erase()
        matched += 1
    return matched


def add_note(layer: ir.Operation, text: str) -> None:
    """Say in the plan and in dumps what a pass has done to a layer, quantized or lowered."""
    if "fpq.note" in layer.attributes:
        text = f"{ir.StringAttr(layer.attributes['fpq.note']).value}; {text}"
    layer.attributes["fpq.note"] = ir.StringAttr.get(text)


def has_no_uses(op: ir.Operation) -> bool:
    """Return whether nothing reads the results of an operation."""
    return all(next(iter(result.uses), None) is None for result in op.results)


def is_read_once(value: ir.Value) -> bool:
    """Return whether one operand of one operation is all that reads a value."""
    return len(list(value.uses)) == 1


def erase_unused(program: Program, values: Iterable[ir.Value]) -> None:
    """Erase what computes some values and is read by nothing, and what then is read by nothing."""
    unused = {value.owner.operation for value in values}
    for op in reversed(program.operations()):
        if op not in unused or not has_no_uses(op):
            continue
        owners = (value.owner for value in op.operands)
        unused |= {owner.operation for owner in owners if not isinstance(owner, ir.Block)}
        unused.remove(op)
        op.erase()
