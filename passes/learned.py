"""What learning has found for a unit, between the work on disk and the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fpcompiler.numerics.adaround import Ended
from fpcompiler.passes.weights import OpenWeight


@dataclass(frozen=True)
class Learned:
    """The roundings of a unit.

    Attributes:
        unit: Its name.
        weights: Its weights.
        codes: Of each, packed; those of round-to-nearest if ``kept`` is false.
        nearest: Error of the unit's output on data held out, rounded to nearest.
        error: The same, learned.
        kept: Whether that is better.
        iterations: How many were made.
        ended: Why not more.
    """

    unit: str
    weights: tuple[OpenWeight, ...]
    codes: tuple[Tensor, ...]
    nearest: float
    error: float
    kept: bool
    iterations: int
    ended: Ended

    @classmethod
    def of(cls, unit: str, weights: Sequence[OpenWeight], result: Mapping[str, Tensor]) -> Learned:
        """Return it from tensors, named as :class:`fpcompiler.reconstruction.Walk` does."""
        nearest, error = result["errors"].tolist()
        return cls(
            unit, tuple(weights), tuple(result[f"codes.{i}"] for i in range(len(weights))),
            nearest, error, bool(result["kept"]), int(result["iterations"]),
            list(Ended)[int(result["ended"])],
        )  # fmt: skip

    @property
    def note(self) -> str:
        """What the plan and the dumps say at each layer."""
        ratio = self.error / self.nearest if self.nearest else 1.0
        if not self.kept:
            return f"rounded to nearest: learning does not help {self.unit} ({ratio:.2f})"
        return f"rounding learned: output error of {self.unit} {ratio:.2f} of rtn"
