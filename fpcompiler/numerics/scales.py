"""The scale of each group of values, from their largest magnitude; see :mod:`.scaling`.

A scale is ``[R or 1, blocks or 1, 1]``: an axis that it is shared over has length 1.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics.blocks import Blocks
from fpcompiler.numerics.rounding import decode, encode, round_into, round_to
from fpcompiler.operand import Operand, ScaleLevel, ScaleRounding

EXPONENT_MASK: Final = 0x7F80_0000
"""The exponent bits of fp32, which are also the bits of its infinity."""

_SMALLEST: Final = 2.0**-126
"""The least a product of scales may be: the smallest normal number of fp32."""

_LARGEST_POWER: Final = 2.0**127


def real_scale(amax: Tensor, operand: Operand) -> Tensor:
    """Return ``amax / max``, or what leaves an E4M3 scale per block its whole range.

    Args:
        amax: fp32, the largest magnitude in each group; 0 gives the scale 1.
        operand: Has a real level.
    """
    largest, least = operand.format.max, _SMALLEST
    spec = operand.block.spec if operand.block else None
    if spec is not None and spec.zero:
        largest, least = largest * spec.max, least / spec.smallest
    return _one_if_zero(_divide(amax, largest).clamp_(min=least), amax)


def block_scale(blocks: Blocks, amax: Tensor, outer: Tensor | None, operand: Operand) -> Tensor:
    """Return the scale of each block, fp32 ``[R, blocks, 1]``: values of the scale's format.

    Args:
        blocks: The values.
        amax: fp32 ``[R, blocks, 1]``, the largest magnitudes; 0 gives the scale 1.
        outer: The scale of the level before, fp32 ``[R or 1, 1, 1]``.
        operand: Has a block level with a scale format.
    """
    level = operand.block
    assert level is not None
    assert level.spec is not None
    low, high = (_e4m3_pair if level.spec.zero else _power_pair)(amax, outer, operand.format, level)
    if level.rounding is ScaleRounding.MSE:
        total_low, total_high = (s if outer is None else s * outer for s in (low, high))
        if level.spec.zero:
            error_high = _squared_error(blocks, total_high, operand.format)
            gain = error_high - _squared_error(blocks, total_low, operand.format)
        else:
            gain = _gain_of_half(blocks, total_low, operand.format)
        low = torch.where(gain > 0, low, high)
    return _one_if_zero(low, amax)


class Quotient:
    """``x / total`` as IEEE has it, in a flush-to-zero mode as well.

    Args:
        total: fp32 ``[R or 1, blocks or 1, 1]``, not subnormal.
    """

    def __init__(self, total: Tensor) -> None:
        self._total = total
        # Subnormal x matter only to a scale as small. PyTorch never flushes them on CUDA.
        self._flushable = not total.is_cuda and float(total.amin()) < 2.0**-100

    def into(self, out: Tensor, value: Tensor, part: slice) -> None:
        """Write ``value / total`` to ``out``, where ``value`` holds the rows of ``part``."""
        total = self._total[part] if self._total.shape[0] > 1 else self._total
        torch.div(value, total, out=out)
        if not self._flushable:
            return
        bits = value.view(torch.int32)
        significand = (bits & 0x7FFF_FFFF).to(torch.float32).copysign_(value)
        quotient = significand.div_(total * 2.0**100).mul_(2.0**-49)
        out.copy_(torch.where((bits & EXPONENT_MASK) == 0, quotient, out))


def _power_pair(
    amax: Tensor, outer: Tensor | None, element: FloatSpec, level: ScaleLevel
) -> tuple[Tensor, Tensor]:
    """Return the E8M0 scales to choose from: the same one twice unless the error decides."""
    least = _least_power(amax, outer)
    if level.rounding is ScaleRounding.FLOOR:
        exponent = _power_below(amax if outer is None else amax / outer).view(torch.int32)
        exponent = (exponent - (element.max_exponent << 23)).clamp_(min=1 << 23)
        scale = torch.maximum(exponent.view(torch.float32), least)
        return scale, scale
    ratio = torch.maximum(_ratio(amax, outer, element), least).clamp_(max=_LARGEST_POWER)
    if level.rounding is ScaleRounding.RNE:
        nearest = round_to(ratio, FORMATS["f8E8M0FNU"])
        return nearest, nearest
    low = _power_below(ratio)
    high = torch.where(low < ratio, low * 2, low)
    return (high, high) if level.rounding is ScaleRounding.CEIL else (low, high)


def _e4m3_pair(
    amax: Tensor, outer: Tensor | None, element: FloatSpec, level: ScaleLevel
) -> tuple[Tensor, Tensor]:
    """Return the E4M3 scales to choose from, as :func:`_power_pair` does."""
    spec = FORMATS["f8E4M3FN"]
    ratio = _ratio(amax, outer, element).clamp_(spec.smallest, spec.max)
    nearest = round_to(ratio, spec)
    if level.rounding is ScaleRounding.RNE:
        return nearest, nearest
    codes = encode(nearest, spec)
    low = decode(codes - (nearest > ratio).to(torch.uint8), spec)
    high = decode(codes + (nearest < ratio).to(torch.uint8), spec)
    if level.rounding is ScaleRounding.FLOOR:
        return low, low
    return (high, high) if level.rounding is ScaleRounding.CEIL else (low, high)


def _ratio(amax: Tensor, outer: Tensor | None, element: FloatSpec) -> Tensor:
    """Return ``amax / (max * outer)``: the scale that puts the largest value at ``max``."""
    if outer is None:
        return _divide(amax, element.max)
    # With the largest fp32 number in the row the product can be half a unit beyond it.
    return amax / (outer * element.max).clamp_(max=torch.finfo(torch.float32).max)


def _divide(value: Tensor, number: float) -> Tensor:
    """Return ``value / number``. On CUDA, PyTorch multiplies by the inverse of a Python number."""
    return value / value.new_full((), number)


def _least_power(amax: Tensor, outer: Tensor | None) -> Tensor:
    """Return the least power of two whose product with ``outer`` is not subnormal."""
    if outer is None:
        return torch.full_like(amax, _SMALLEST)
    return (_SMALLEST / _power_below(outer)).clamp_(min=_SMALLEST)


def _power_below(value: Tensor) -> Tensor:
    """Return ``2**floor(log2(value))``, exactly; 0 for subnormal numbers and 0."""
    return (value.view(torch.int32) & EXPONENT_MASK).view(torch.float32)


def _gain_of_half(blocks: Blocks, total: Tensor, element: FloatSpec) -> Tensor:
    """Return how much smaller the squared error of each block is than with a scale twice as large.

    In units of ``total`` the numbers of the larger scale are those of the format with a bias one
    less, so one quotient ``y`` serves both. With ``l`` and ``h`` the numbers that ``y`` is rounded
    to, ``(y - h)**2 - (y - l)**2 = (h - l) * (h + l - 2 * y)``, of which little is rounded.

    Returns:
        fp64 ``[R, blocks, 1]``, in units of ``total**2``.
    """
    doubled = dataclasses.replace(element, bias=element.bias - 1)
    gain = blocks.new_sums()
    scratch, quotients = blocks.scratch, Quotient(total)
    for part in blocks.parts():
        value = blocks.load(part)
        buffers = [
            scratch.take(name, value.shape, torch.float32) for name in ("y", "l", "h", "sum")
        ]
        y, rounded, coarse, both = buffers
        quotients.into(y, value, part)
        round_into(rounded, y, element, scratch)
        round_into(coarse, y, doubled, scratch)
        torch.add(coarse, rounded, out=both).sub_(y, alpha=2)
        blocks.add_up(coarse.sub_(rounded).mul_(both), gain[part])
    return gain


def _squared_error(blocks: Blocks, total: Tensor, element: FloatSpec) -> Tensor:
    """Return the squared error of each block, fp64 ``[R, blocks, 1]``.

    Errors are squared in units of ``total``, where they neither overflow nor underflow.
    """
    squares = blocks.new_sums()
    scratch, quotients = blocks.scratch, Quotient(total)
    for part in blocks.parts():
        value = blocks.load(part)
        y = scratch.take("y", value.shape, torch.float32)
        rounded = scratch.take("l", value.shape, torch.float32)
        quotients.into(y, value, part)
        round_into(rounded, y, element, scratch)
        blocks.add_up(rounded.sub_(y).square_(), squares[part])
    return squares.mul_(total.double().square_())


def _one_if_zero(scale: Tensor, amax: Tensor) -> Tensor:
    return scale.masked_fill(amax.view(torch.int32) == 0, 1.0)
