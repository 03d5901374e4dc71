"""Forms beside packed codes in which kernels read quantized activations.

============  ====================================================================================
``""``        The codes themselves, packed.
``f8E4M3FN``  The E4M3 codes of the same numbers, one a byte: what FP8 instructions read.
``i8``        The numbers times one power of two that makes all of them integers, one a byte, for
              integer instructions. Behind the scales of tokens stand the sums of the integers of
              each token, int32: a kernel that adds an offset to weights takes it off with them.
``bf16``      The numbers times the scale of their block, bfloat16. No scales of blocks are left,
              and those of tokens and tensors stay outside, as in all forms.
============  ====================================================================================

Nothing is rounded in any of them, but for products beyond the range of bf16 (2**-133 to 2**128),
which are rounded as fp32 is to bf16. That takes a scale of a block below 2**-116, or numbers next
to the largest of fp32.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.operand import Granularity, Operand

E4M3: Final = "f8E4M3FN"
I8: Final = "i8"
BF16: Final = "bf16"

STORED: Final = ("", E4M3, I8, BF16)
"""Every form by name; the empty one is that of packed codes."""

_LARGEST_I8: Final = 127
_BF16_SIGNIFICANDS: Final = 1 << 8


def code_bits(spec: FloatSpec, stored: str) -> int:
    """Return the bits that a value takes in memory: 4, 6, 8 or 16."""
    return {"": spec.storage_bits, E4M3: 8, I8: 8, BF16: 16}[stored]


def integer_shift(spec: FloatSpec) -> int:
    """Return the least ``s`` for which every number of a format times ``2**s`` is an integer."""
    return spec.mantissa_bits - spec.min_exponent


def why_not(operand: Operand, stored: str) -> str:
    """Return why activations cannot be stored in a form; empty if they can."""
    if stored not in STORED:
        return f"there is no form {stored!r}; forms: {', '.join(filter(None, STORED))}"
    if stored == E4M3 and not _is_in_e4m3(operand.format):
        return f"E4M3 does not hold every number of {operand.format} in other bits than its own"
    if stored == I8:
        return _why_not_i8(operand)
    return _why_not_bf16(operand) if stored == BF16 else ""


def _is_in_e4m3(spec: FloatSpec) -> bool:
    return spec.storage_bits < 8 and set(spec.values) <= set(FORMATS[E4M3].values)


def _why_not_i8(operand: Operand) -> str:
    outer = operand.outer
    if operand.block or outer is None or outer.granularity is Granularity.TENSOR:
        return "integers are for one scale per token, without blocks"
    largest = math.ldexp(operand.format.max, integer_shift(operand.format))
    if largest > _LARGEST_I8:
        return f"the numbers of {operand.format} are integers up to {largest:.0f}, and no int8"
    return ""


def _why_not_bf16(operand: Operand) -> str:
    block = operand.block
    if block is None:
        return ""
    if block.spec is None:
        return "bf16 does not hold products with real scales"
    if not _products_fit(operand.format, block.spec):
        return f"bf16 does not hold every product of {operand.format} and {block.format}"
    return ""


@cache
def _products_fit(spec: FloatSpec, scale: FloatSpec) -> bool:
    """Return whether all products have significands of eight bits."""
    pairs = ((a, b) for a in _significands(spec) for b in _significands(scale))
    return all(a * b < _BF16_SIGNIFICANDS for a, b in pairs)


def _significands(spec: FloatSpec) -> frozenset[int]:
    """Return what is left of the positive numbers without their powers of two: odd integers."""
    numbers = (v for v in spec.values if math.isfinite(v) and v > 0)
    numerators = (v.as_integer_ratio()[0] for v in numbers)
    return frozenset(n // (n & -n) for n in numerators)
