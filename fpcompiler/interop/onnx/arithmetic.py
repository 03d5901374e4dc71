"""The quantization of activations in elementary operations of ONNX: ours, bit for bit.

:mod:`fpcompiler.numerics` works on the bits of numbers, which ONNX has no operations for below
opset 26. Two replacements are exact too:

* ``2**floor(log2(v))`` is ``q - (1 - u) * q`` with ``q = (1 / (2 * u) + 1) * v`` and
  ``u = 2**-24``, each operation rounded to fp32 (S. M. Rump, T. Ogita, S. Oishi, Accurate
  floating-point summation part I, SIAM J. Sci. Comput. 31, 2008: the unit in the first place). It
  holds for every normal number that ``q`` does not overflow with; larger ones are scaled before.
* A value is rounded to a multiple of ``2**(e - m)`` by ``Round``, which breaks ties to even, behind
  a division by that power.

NaN and infinity are no error here, as they are in our runtime: they come out as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.interop.onnx.builder import Builder
from fpcompiler.operand import Granularity, Operand, ScaleLevel, ScaleRounding

__all__ = ["Grouped", "Rounded", "encode", "encode_power", "group", "join", "quantize", "round_to"]

_SMALLEST: Final = 2.0**-126
_LARGEST_POWER: Final = 2.0**127
_LARGEST: Final = float(np.finfo(np.float32).max)
_FIRST_PLACE: Final = float(2**23 + 1)
_BELOW_ONE: Final = 1 - 2.0**-24
_BIG: Final = 2.0**64


@dataclass(frozen=True)
class Grouped:
    """Values to quantize, in the groups of the operand.

    Attributes:
        x: The values, ``[..., K]``.
        blocks: The same as ``[..., blocks, width]``; where there are no blocks, ``x`` itself.
        rank: Of ``x``.
        k: The length of its last axis; None if it varies.
    """

    x: ir.Value
    blocks: ir.Value
    rank: int
    k: int | None


@dataclass(frozen=True)
class Rounded:
    """What :func:`quantize` gives.

    Attributes:
        elements: The element of each value, fp32 in the shape of ``Grouped.blocks``.
        outer: The scale of the tensor, row or token, or None.
        block: The scale of each block, ``[..., blocks, 1]``, or None.
    """

    elements: ir.Value
    outer: ir.Value | None
    block: ir.Value | None


def join(b: Builder, values: Grouped, blocks: ir.Value, operand: Operand) -> ir.Value:
    """Return what is in the groups of an operand, ``[..., blocks, width]``, as ``[..., K]``."""
    if operand.block is None:
        return blocks
    return b.join_blocks(blocks, values.x, values.rank, values.k, operand.block.block)


def group(b: Builder, x: ir.Value, operand: Operand, rank: int, k: int | None) -> Grouped:
    """Return values in the groups of an operand."""
    if operand.block is None:
        return Grouped(x, x, rank, k)
    return Grouped(x, b.split_blocks(x, rank, k, operand.block.block), rank, k)


def quantize(
    b: Builder, values: Grouped, operand: Operand, outer: ir.Value | None = None
) -> Rounded:
    """Return elements and scales, as :func:`fpcompiler.numerics.quantize` finds them.

    Args:
        b: Where operations are put.
        values: The values.
        operand: What they become.
        outer: A scale of the tensor that is given, with as many axes as the values, as for
            :func:`fpcompiler.numerics.quantize_within`; else it is found too.
    """
    magnitude = b.op("Abs", values.blocks)
    if outer is None:
        outer = _outer(b, magnitude, operand)
    level = operand.block
    if level is None:
        y = values.x if outer is None else b.op("Div", values.x, outer)
        return Rounded(round_to(b, y, operand.format), outer, None)
    amax = b.op("ReduceMax", magnitude, b.integers([-1]), keepdims=1)
    above = None if outer is None else b.op("Unsqueeze", outer, b.integers([-1]))
    if level.is_real:
        scale = _real_scale(b, amax, operand)
        y = b.op("Div", values.blocks, scale)
        return Rounded(round_to(b, y, operand.format), outer, scale)
    elements, scale = _in_blocks(b, values.blocks, amax, above, operand, level)
    return Rounded(elements, outer, scale)


def _outer(b: Builder, magnitude: ir.Value, operand: Operand) -> ir.Value | None:
    """Return the scale of the tensor (an axis of length 1 for each) or of each token."""
    if operand.outer is None:
        return None
    axes = [-2, -1] if operand.block else [-1]
    amax = b.op("ReduceMax", magnitude, b.integers(axes), keepdims=1)
    if operand.block:
        amax = b.op("Squeeze", amax, b.integers([-1]))
    if operand.outer.granularity is Granularity.TENSOR:
        amax = b.op("ReduceMax", amax, keepdims=1)
    return _real_scale(b, amax, operand)


def _real_scale(b: Builder, amax: ir.Value, operand: Operand) -> ir.Value:
    """:func:`fpcompiler.numerics.scales.real_scale`."""
    largest, least = operand.format.max, _SMALLEST
    spec = operand.block.spec if operand.block else None
    if spec is not None and spec.zero:
        largest, least = largest * spec.max, least / spec.smallest
    scale = b.op("Max", b.op("Div", amax, b.number(largest)), b.number(least))
    return _one_if_zero(b, scale, amax)


def _in_blocks(
    b: Builder,
    x: ir.Value,
    amax: ir.Value,
    outer: ir.Value | None,
    operand: Operand,
    level: ScaleLevel,
) -> tuple[ir.Value, ir.Value]:
    """Return the elements, and the scale of each block in a scale format."""
    assert level.spec is not None
    pair = _e4m3_pair if level.spec.zero else _power_pair
    low, high = pair(b, amax, outer, operand.format, level)
    if level.rounding is not ScaleRounding.MSE:
        scale = _one_if_zero(b, low, amax)
        return round_to(b, _quotient(b, x, scale, outer), operand.format), scale
    if level.spec.zero:
        take_low = _less_error(b, x, low, high, outer, operand.format)
        scale = _one_if_zero(b, b.op("Where", take_low, low, high), amax)
        return round_to(b, _quotient(b, x, scale, outer), operand.format), scale
    y = _quotient(b, x, low, outer)
    fine = round_to(b, y, operand.format)
    coarse = round_to(b, y, replace(operand.format, bias=operand.format.bias - 1))
    take_low = b.op("Or", _gain(b, y, fine, coarse), b.op("Equal", low, high))
    scale = _one_if_zero(b, b.op("Where", take_low, low, high), amax)
    # In units of the larger scale, which is twice the other, the coarse numbers are halves.
    halves = b.op("Mul", coarse, b.number(0.5))
    return b.op("Where", take_low, fine, halves), scale


def _quotient(b: Builder, x: ir.Value, scale: ir.Value, outer: ir.Value | None) -> ir.Value:
    total = scale if outer is None else b.op("Mul", scale, outer)
    return b.op("Div", x, total)


def _gain(b: Builder, y: ir.Value, fine: ir.Value, coarse: ir.Value) -> ir.Value:
    """Whether the error with the smaller scale is smaller: ``scales._gain_of_half``."""
    both = b.op("Sub", b.op("Add", coarse, fine), b.op("Mul", y, b.number(2.0)))
    terms = b.op("Mul", b.op("Sub", coarse, fine), both)
    gain = _sum(b, terms)
    return b.op("Greater", gain, b.number(0.0, np.float64))


def _less_error(
    b: Builder,
    x: ir.Value,
    low: ir.Value,
    high: ir.Value,
    outer: ir.Value | None,
    element: FloatSpec,
) -> ir.Value:
    """Whether the error with ``low`` is the smaller one: ``scales._squared_error``, twice."""
    errors = []
    for scale in (low, high):
        total = scale if outer is None else b.op("Mul", scale, outer)
        y = b.op("Div", x, total)
        difference = b.op("Sub", round_to(b, y, element), y)
        wide = b.cast(total, ir.DataType.DOUBLE)
        squares = _sum(b, b.op("Mul", difference, difference))
        errors.append(b.op("Mul", squares, b.op("Mul", wide, wide)))
    return b.op("Greater", errors[1], errors[0])


def _sum(b: Builder, terms: ir.Value) -> ir.Value:
    wide = b.cast(terms, ir.DataType.DOUBLE)
    return b.op("ReduceSum", wide, b.integers([-1]), keepdims=1)


def _power_pair(
    b: Builder, amax: ir.Value, outer: ir.Value | None, element: FloatSpec, level: ScaleLevel
) -> tuple[ir.Value, ir.Value]:
    """:func:`fpcompiler.numerics.scales._power_pair`."""
    least = b.number(_SMALLEST)
    if outer is not None:
        least = b.op("Max", b.op("Div", least, _power_below(b, outer)), least)
    if level.rounding is ScaleRounding.FLOOR:
        above = amax if outer is None else b.op("Div", amax, outer)
        power = b.op("Mul", _power_below(b, above), b.number(2.0**-element.max_exponent))
        scale = b.op("Max", power, least)
        return scale, scale
    ratio = b.op("Max", _ratio(b, amax, outer, element), least)
    ratio = b.op("Min", ratio, b.number(_LARGEST_POWER))
    low = _power_below(b, ratio)
    double = b.op("Mul", low, b.number(2.0))
    if level.rounding is ScaleRounding.RNE:
        half = b.op("Mul", low, b.number(1.5))
        nearest = b.op("Where", b.op("GreaterOrEqual", ratio, half), double, low)
        return nearest, nearest
    high = b.op("Where", b.op("Less", low, ratio), double, low)
    return (high, high) if level.rounding is ScaleRounding.CEIL else (low, high)


def _e4m3_pair(
    b: Builder, amax: ir.Value, outer: ir.Value | None, element: FloatSpec, level: ScaleLevel
) -> tuple[ir.Value, ir.Value]:
    """:func:`fpcompiler.numerics.scales._e4m3_pair`."""
    spec = FORMATS["f8E4M3FN"]
    ratio = b.op("Max", _ratio(b, amax, outer, element), b.number(spec.smallest))
    ratio = b.op("Min", ratio, b.number(spec.max))
    if level.rounding is ScaleRounding.RNE:
        nearest = round_to(b, ratio, spec)
        return nearest, nearest
    step = _step(b, ratio, spec)
    steps = b.op("Div", ratio, step)
    low, high = (b.op("Mul", b.op(name, steps), step) for name in ("Floor", "Ceil"))
    if level.rounding is ScaleRounding.FLOOR:
        return low, low
    return (high, high) if level.rounding is ScaleRounding.CEIL else (low, high)


def _ratio(b: Builder, amax: ir.Value, outer: ir.Value | None, element: FloatSpec) -> ir.Value:
    largest = b.number(element.max)
    if outer is None:
        return b.op("Div", amax, largest)
    product = b.op("Min", b.op("Mul", outer, largest), b.number(_LARGEST))
    return b.op("Div", amax, product)


def _one_if_zero(b: Builder, scale: ir.Value, amax: ir.Value) -> ir.Value:
    return b.op("Where", b.op("Equal", amax, b.number(0.0)), b.number(1.0), scale)


def round_to(b: Builder, y: ir.Value, spec: FloatSpec) -> ir.Value:
    """Return the nearest values of a format with zero: :func:`fpcompiler.numerics.round_to`."""
    low = -spec.max if spec.signed else 0.0
    y = b.op("Clip", y, b.number(low), b.number(spec.max))
    step = _step(b, b.op("Abs", y), spec)
    return b.op("Mul", b.op("Round", b.op("Div", y, step)), step)


def _step(b: Builder, magnitude: ir.Value, spec: FloatSpec) -> ir.Value:
    """Return the distance of the format's values around each magnitude within its range."""
    bounded = b.op("Max", magnitude, b.number(2.0**spec.min_exponent))
    power = _first_place(b, bounded)
    return b.op("Mul", power, b.number(2.0**-spec.mantissa_bits)) if spec.mantissa_bits else power


def _first_place(b: Builder, value: ir.Value) -> ir.Value:
    """Return ``2**floor(log2(value))`` of numbers from 2**-126 to 2**104."""
    q = b.op("Mul", value, b.number(_FIRST_PLACE))
    return b.op("Sub", q, b.op("Mul", q, b.number(_BELOW_ONE)))


def _power_below(b: Builder, value: ir.Value) -> ir.Value:
    """Return ``2**floor(log2(value))`` of any positive normal number, and 0 of 0."""
    big = b.op("GreaterOrEqual", value, b.number(_BIG))
    small = b.op("Where", big, b.op("Mul", value, b.number(1 / _BIG)), value)
    power = _first_place(b, small)
    return b.op("Where", big, b.op("Mul", power, b.number(_BIG)), power)


def encode(b: Builder, elements: ir.Value, spec: FloatSpec) -> ir.Value:
    """Return the codes, uint8, of values that a format has; the sign of zero is lost."""
    magnitude = b.op("Abs", elements)
    step = _step(b, magnitude, spec)
    # The integer of a magnitude is below 2**(m + 1); one binade up it begins again at 2**m.
    binades = _log2(b, b.op("Div", step, b.number(2.0 ** (spec.min_exponent - spec.mantissa_bits))))
    code = b.op(
        "Add", b.op("Div", magnitude, step), b.op("Mul", binades, b.number(2.0**spec.mantissa_bits))
    )
    if spec.signed:
        sign = b.number(float(1 << spec.magnitude_bits))
        negative = b.op("Less", elements, b.number(0.0))
        code = b.op("Add", code, b.op("Where", negative, sign, b.number(0.0)))
    return b.cast(code, ir.DataType.UINT8)


def encode_power(b: Builder, powers: ir.Value) -> ir.Value:
    """Return the E8M0 codes, uint8, of powers of two from 2**-126 to 2**127."""
    return b.cast(b.op("Add", _log2(b, powers), b.number(127.0)), ir.DataType.UINT8)


def _log2(b: Builder, powers: ir.Value) -> ir.Value:
    """Return the exponents of powers of two: the logarithm is off by less than a half."""
    return b.op("Round", b.op("Mul", b.op("Log", powers), b.number(float(1 / np.log(2.0)))))
