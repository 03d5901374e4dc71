"""The rounding rules of tensor cores once more, with fractions, one output at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fpcompiler.formats import FloatSpec

SMALLEST = -126


@dataclass(frozen=True)
class Number:
    """A value and the exponent that the hardware aligns it by; None for zero."""

    value: Fraction
    exponent: int | None

    @property
    def significand(self) -> Fraction:
        return self.value / power(self.exponent or 0)


ONE = Number(Fraction(1), 0)


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def of_code(code: int, spec: FloatSpec) -> Number:
    value = Fraction(spec.value(code))
    field = code >> spec.mantissa_bits & (1 << spec.exponent_bits) - 1
    exponent = field - spec.bias if field or not spec.zero else 1 - spec.bias
    return Number(value, exponent if value else None)


def of_float(value: float) -> Number:
    if not value:
        return Number(Fraction(0), None)
    return Number(Fraction(value), max(math.frexp(value)[1] - 1, SMALLEST))


def cut(value: Fraction, unit: Fraction) -> Fraction:
    """Return the multiple of a unit next to a value, towards zero."""
    return math.trunc(value / unit) * unit


def add(accumulator: Fraction, terms: list[Number], fraction_bits: int, bits: int) -> Fraction:
    """Return the accumulator after one instruction."""
    own = of_float(float(accumulator)).exponent
    exponents = [SMALLEST if own is None else own]
    exponents += [term.exponent for term in terms if term.exponent is not None]
    unit = power(max(exponents) - fraction_bits)
    total = sum((cut(term.value, unit) for term in terms), cut(accumulator, unit))
    if not total:
        return total
    leading = total.numerator.bit_length() - total.denominator.bit_length()
    leading -= abs(total) < power(leading)
    return cut(total, power(max(leading, SMALLEST) - bits))


def product(*numbers: Number) -> Number:
    if any(number.exponent is None for number in numbers):
        return Number(Fraction(0), None)
    value = math.prod((n.value for n in numbers), start=Fraction(1))
    return Number(value, sum(n.exponent for n in numbers))


def dot(
    a: list[Number], b: list[Number], scales: list[tuple[Number, Number]], k: int, bits: int
) -> float:
    """Return a chain of instructions that add ``k`` products; ``scales`` of each product."""
    fraction_bits = 13 if bits == 13 else 25
    total = Fraction(0)
    for start in range(0, len(a), k):
        stop = min(start + k, len(a))
        terms = [product(a[i], b[i], *scales[i]) for i in range(start, stop)]
        total = add(total, terms, fraction_bits, bits)
    return float(total)


def dot_fp4(a: list[Number], b: list[Number], scales: list[tuple[Number, Number]]) -> float:
    """Return the same for FP4 by FP4: 64 products in four sums that are exact."""
    total = Fraction(0)
    for start in range(0, len(a), 64):
        terms = []
        for first in range(start, min(start + 64, len(a)), 16):
            part = range(first, min(first + 16, len(a)))
            exact = sum((a[i].value * b[i].value for i in part), Fraction(0))
            scale = product(*scales[first])
            terms.append(Number(exact * scale.value, scale.exponent))
        total = add(total, terms, 35, 23)
    return float(total)
