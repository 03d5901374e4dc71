"""The formats that a search may choose among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from fpcompiler.errors import PassError
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand
from fpcompiler.target import Target

CHOICES: Final = ("same-bits", "given")
"""``same-bits``: the formats that are as wide as the given one; ``given``: that one only."""

WIDTHS: Final = (4, 6, 8)
"""Bits that a code may have."""


def check_choice(name: str, option: str, value: str, known: Sequence[str]) -> None:
    """Check an option of a pass.

    Raises:
        PassError: If the value is not known.
    """
    if value not in known:
        raise PassError(f"{name}: {option} must be one of {', '.join(known)}: {value!r}")


def candidates(operand: Operand, choice: str) -> list[Operand]:
    """Return the operand, and then those that differ from it in the format only."""
    if choice == "given":
        return [operand]
    given = operand.format
    same = [s for s in FORMATS.values() if s.signed and s.storage_bits == given.storage_bits]
    return [operand, *(replace(operand, format=spec) for spec in same if spec is not given)]


def of_widths(target: Target, weight: Operand, given: Operand | None, choice: str) -> list[Operand]:
    """Return what is possible for a weight in 4, 6 and 8 bits, with the scale levels it has.

    Args:
        target: What must be able to run it with the given input.
        weight: What the scheme says; it comes first, also where the target cannot run it.
        given: The input's operand, None for 16 bits or more.
        choice: What is possible in the width that the weight has.
    """
    own = candidates(weight, choice)
    for bits in WIDTHS:
        if bits != weight.format.storage_bits:
            spec = next(s for s in FORMATS.values() if s.signed and s.storage_bits == bits)
            own += candidates(replace(weight, format=spec), "same-bits")
    return [w for w in own if w == weight or target.kind_for(w, given) is not None]


def for_weights(
    target: Target, weights: Sequence[Operand], given: Operand | None, choice: str
) -> list[list[Operand]]:
    """Return for each weight what goes with the given input.

    What is given comes first, also where the target cannot run it: ``lower-gemm`` says so.
    """
    return [
        [w for w in candidates(own, choice) if w == own or target.kind_for(w, given) is not None]
        for own in weights
    ]


def for_input(
    target: Target, weights: Sequence[Operand], given: Operand, choice: str
) -> list[Operand]:
    """Return for the input what goes with all of the weights; what is given comes first."""
    return [
        own
        for own in candidates(given, choice)
        if own == given or all(target.kind_for(weight, own) is not None for weight in weights)
    ]
