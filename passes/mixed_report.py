"""What ``mixed-formats`` had to choose among, as a table: bits against predicted damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fpcompiler.numerics.mixed import Frontier, Point
from fpcompiler.operand import Operand
from fpcompiler.passes.candidates import WIDTHS

_ROWS: Final = 11
_MEANINGS: Final = {
    "fisher": "the squared change of the model's output, to first order, by rounded weights",
    "mse": "squared errors of the layers' outputs relative to their squares, summed over layers",
}


@dataclass(frozen=True)
class Layer:
    """What is possible for the weight of a layer.

    Attributes:
        name: The layer.
        operands: The formats, that of the scheme first.
        sizes: The bits that the weight takes in each, scales included.
        damages: What each is predicted to do.
    """

    name: str
    operands: tuple[Operand, ...]
    sizes: tuple[int, ...]
    damages: tuple[float, ...]

    def relative(self, number: int) -> float:
        """Return the damage of a format relative to that of the scheme's; 1 where both are zero."""
        given = self.damages[0]
        return self.damages[number] / given if given else 1.0


@dataclass(frozen=True)
class Choices:
    """What is possible for a model.

    Attributes:
        layers: The weights that a format is chosen for.
        frontier: The best choices for these.
        fixed: Bits of the quantized weights that keep their format.
        values: How many values all quantized weights have.
    """

    layers: tuple[Layer, ...]
    frontier: Frontier
    fixed: int
    values: int

    def bits(self, size: int) -> float:
        """Return the bits for each value when the weights that are chosen for take ``size``."""
        return (size + self.fixed) / self.values

    @property
    def given(self) -> Point:
        """What the scheme says."""
        size = sum(layer.sizes[0] for layer in self.layers)
        damage = sum(layer.damages[0] for layer in self.layers)
        return Point(size, damage, (0,) * len(self.layers))


def report(choices: Choices, chosen: Point, budget: float, sensitivity: str) -> str:
    """Return the table in Markdown: about eleven points, the chosen one, and the scheme.

    Args:
        choices: What was possible.
        chosen: The point that was chosen.
        budget: The bits that were allowed.
        sensitivity: What was predicted.
    """
    points = {point.size: (point, "") for point in choices.frontier.spread(_ROWS)}
    points[chosen.size] = chosen, "chosen"
    rows = [points[size] for size in sorted(points)]
    rows.append((choices.given, "the scheme as it is"))
    widths = " | ".join(f"in {bits} bits" for bits in WIDTHS)
    lines = [
        f"# Mixed formats for {budget:g} bits a weight",
        "",
        f"Bits include scales. Damage ({_MEANINGS[sensitivity]}) is relative to the scheme's; "
        "each row has the least that is possible for its bits.",
        "",
        f"| bits | damage | layers {widths} | |",
        f"|--:|--:|{'--:|' * len(WIDTHS)}---|",
    ]
    lines += [_line(choices, point, note) for point, note in rows]
    if choices.fixed:
        lines += ["", "Weights that keep their format count among the bits, not among the layers."]
    return "\n".join(lines) + "\n"


def _line(choices: Choices, point: Point, note: str) -> str:
    given = choices.given.damage
    damage = f"{point.damage / given:.2%}" if given else "0"
    counts = _widths(choices.layers, point.chosen)
    widths = " | ".join(str(counts[bits]) for bits in WIDTHS)
    return f"| {choices.bits(point.size):.3f} | {damage} | {widths} | {note} |"


def _widths(layers: Sequence[Layer], chosen: Sequence[int]) -> Counter[int]:
    """Return how many layers have weights of each width."""
    return Counter(
        layer.operands[number].format.storage_bits
        for layer, number in zip(layers, chosen, strict=True)
    )
