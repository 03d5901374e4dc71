"""What a scheme says about one layer."""

from __future__ import annotations

from dataclasses import dataclass

from fpcompiler.errors import FormatError
from fpcompiler.operand import Granularity, Operand
from fpcompiler.scheme.patterns import check_pattern, quote


@dataclass(frozen=True)
class LayerScheme:
    """What one layer is quantized to.

    Attributes:
        weight: The operand of the weights, or None if the layer stays in high precision.
        activation: The operand of the activations, quantized at each call, or None.
    """

    weight: Operand | None = None
    activation: Operand | None = None

    def __post_init__(self) -> None:
        """Check that the operands fit their side of the product.

        Raises:
            FormatError: If they do not.
        """
        if self.weight is None and self.activation is not None:
            raise FormatError(
                "activations cannot be quantized alone: give the weights a format too."
            )
        _refuse_level(self.weight, Granularity.TOKEN, "weights have rows: write row:f32")
        _refuse_level(self.activation, Granularity.ROW, "activations have tokens: write token:f32")

    def __str__(self) -> str:
        """Return ``skip``, or the operands as in the exact form of a scheme."""
        if self.weight is None:
            return "skip"
        return f"w={self.weight},a={self.activation or 'none'}"


def _refuse_level(operand: Operand | None, granularity: Granularity, advice: str) -> None:
    if operand and any(level.granularity is granularity for level in operand.levels):
        raise FormatError(f"{operand} has a scale per {granularity.value}; {advice}.")


@dataclass(frozen=True)
class Rule:
    """What the layers that a pattern matches are quantized to; no weight operand means skip."""

    pattern: str
    layer: LayerScheme

    def __post_init__(self) -> None:
        """Check the pattern."""
        check_pattern(self.pattern)

    def __str__(self) -> str:
        """Return the text of the rule in the exact form of a scheme."""
        return f"{quote(self.pattern)}: {self.layer}"


@dataclass(frozen=True)
class Match:
    """What a scheme says about one layer, and which part of it said so."""

    weight: Operand | None
    activation: Operand | None
    rule: str
