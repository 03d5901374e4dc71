"""The formats that a search may choose among."""

from __future__ import annotations

import pytest

from fpcompiler.operand import Operand
from fpcompiler.passes.candidates import candidates, for_input, for_weights
from fpcompiler.target import lookup

WEIGHT, INPUT = Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("e2m1@row:f32", "E2M1 E1M2 E3M0"),
        ("e3m2@token:f32", "E3M2 E2M3 E1M4 E4M1 E5M0"),
        ("e4m3@block32:e8m0", "E4M3 E3M4 E3M4 E1M6 E2M5 E5M2"),
    ],
)
def test_same_bits_has_every_split_and_what_is_given_comes_first(given: str, names: str) -> None:
    operand = Operand.parse(given)
    found = candidates(operand, "same-bits")
    assert found[0] == operand
    assert [own.format.short for own in found] == names.split()
    assert {own.levels for own in found} == {operand.levels}
    assert candidates(operand, "given") == [operand]


def test_the_reference_takes_every_split() -> None:
    reference = lookup("reference")
    assert for_input(reference, [WEIGHT], INPUT, "same-bits") == candidates(INPUT, "same-bits")
    wide = Operand.parse("e1m6@row:f32")
    (found,) = for_weights(reference, [wide], INPUT, "same-bits")
    assert found == candidates(wide, "same-bits")
