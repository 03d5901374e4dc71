"""The two numbers of a format between which each value lies, as positions in the list of them.

The position of a number is its magnitude code with the sign of the number: positions rise with the
numbers, and neighbours differ by one, whatever the step between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.rounding import decode, encode


def lower_position(value: Tensor, spec: FloatSpec) -> Tensor:
    """Return the position of the largest number of a format that is not above each value.

    Args:
        value: fp32 or fp64, finite, no magnitude above the largest of the format.
        spec: A signed format.

    Returns:
        int16, shape of ``value``.
    """
    nearest = encode(value, spec)
    above = decode(nearest, spec, value.dtype) > value
    magnitude = (nearest & (1 << spec.magnitude_bits) - 1).to(torch.int16)
    negative = nearest >> spec.magnitude_bits != 0
    return torch.where(negative, -magnitude, magnitude).sub_(above.to(torch.int16))


def upper_position(lower: Tensor, spec: FloatSpec) -> Tensor:
    """Return the next position; the largest number of a format has no other above it."""
    return (lower + 1).clamp_(max=spec.max_code)


def code_of(position: Tensor, negative: Tensor, spec: FloatSpec) -> Tensor:
    """Return the codes at positions.

    Args:
        position: Integers.
        negative: Where 0 is the code of ``-0``, as rounding gives for small negative values.
        spec: The format.

    Returns:
        uint8, shape of ``position``.
    """
    sign = (position < 0) | (position == 0) & negative
    return (position.abs() + (sign.to(position.dtype) << spec.magnitude_bits)).to(torch.uint8)
