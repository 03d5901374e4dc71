"""What all tasks share: the task, its result, and how two results compare."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

from fpcompiler.errors import OptionError

__all__ = [
    "Direction", "Result", "Task", "Recovery", "recoveries", "Model", "Track", "without_bar",
]  # fmt: skip

Program: TypeAlias = Callable[..., Any]
"""An eager module, a compiled model, or any function that is called like one."""

Model: TypeAlias = Program | tuple[Program, ...]
"""What is evaluated: one program, or the programs of a model that is compiled in parts."""

Track: TypeAlias = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Shows a bar for a loop: ``for item in track(items, len(items), label)``."""


def without_bar(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """Show nothing: the default :data:`Track`."""
    return items


class Direction(enum.Enum):
    """Which values of a metric are better."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True)
class Result:
    """What a task measured on one model.

    Attributes:
        metrics: The values by name of the metric; the first one is the one to quote.
        direction: Which values are better, for all of them.
        count: How much was measured.
        counted: What is counted: tokens, items, pairs.
    """

    metrics: Mapping[str, float]
    direction: Direction
    count: int
    counted: str


class Task(ABC):
    """Something to measure, with its data. Subclasses are frozen dataclasses.

    Attributes:
        name: One word for tables.
        metric: The first metric of its results.
        direction: Which values of its metrics are better.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    direction: ClassVar[Direction]

    @abstractmethod
    def run(self, model: Model, progress: Track = without_bar) -> Result:
        """Measure a model. Data move to its device; no gradients are kept.

        Raises:
            OptionError: If the data do not fit the model, for instance its vocabulary.
            NumericsError: If the model gives NaN or infinity.
            RunError: If the model fails.
        """

    def against(self, original: Model) -> Self:
        """Return the task that compares with an original model; most tasks need none."""
        return self


@dataclass(frozen=True)
class Recovery:
    """One metric of the original and of the compiled model.

    Attributes:
        metric: Name of the metric.
        direction: Which values are better.
        original: Value of the original model.
        compiled: Value of the compiled model.
    """

    metric: str
    direction: Direction
    original: float
    compiled: float

    @property
    def ratio(self) -> float | None:
        """``compiled / original``, whichever direction is better.

        Where lower values are better, 1.05 is 5% worse. None if the original's value is not
        positive (no word errors, a negative correlation): a ratio to it says nothing.
        """
        return self.compiled / self.original if self.original > 0 else None

    @property
    def loss(self) -> float | None:
        """By which share of the original's value the compiled model is worse; negative: better."""
        if self.ratio is None:
            return None
        return 1 - self.ratio if self.direction is Direction.HIGHER else self.ratio - 1


def recoveries(original: Result, compiled: Result) -> tuple[Recovery, ...]:
    """Return how much of each metric is left.

    Raises:
        OptionError: If the results are not of the same task on the same data.
    """
    same = (
        list(original.metrics) == list(compiled.metrics)
        and original.direction is compiled.direction
        and (original.count, original.counted) == (compiled.count, compiled.counted)
    )
    if not same:
        raise OptionError(
            "results of different tasks cannot be compared: "
            f"{_short(original)}; {_short(compiled)}."
        )
    return tuple(
        Recovery(name, original.direction, value, compiled.metrics[name])
        for name, value in original.metrics.items()
    )


def _short(result: Result) -> str:
    return f"{', '.join(result.metrics)} of {result.count} {result.counted}"
