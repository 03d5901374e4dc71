"""The formats of LLM-FP4, and its biases: another way to write the scale of a format."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.errors import FormatError
from fpcompiler.formats import FORMATS, FloatSpec, Specials

_SPLITS = {4: range(0, 3), 6: range(0, 5), 8: range(2, 7)}
"""Mantissa bits for each width. At 8 bits those of the released code, which avoids overflow."""


def finite_format(exponent_bits: int, mantissa_bits: int) -> FloatSpec:
    """Return the signed format with these fields in which every code is a number.

    That is the row of :data:`fpcompiler.formats.FORMATS` where there is one, and otherwise a new
    format with the bias of IEEE, whose name (``f8E4M3Finite``) no standard uses.

    Raises:
        FormatError: If a field is empty where it must not be, or the code has more than 8 bits.
    """
    if exponent_bits < 1 or mantissa_bits < 0 or exponent_bits + mantissa_bits > 7:
        raise FormatError(
            f"E{exponent_bits}M{mantissa_bits} is not possible: a format has at least one "
            "exponent bit and, with its sign, at most 8 bits."
        )
    fields = (exponent_bits, mantissa_bits)
    for spec in FORMATS.values():
        own = (spec.exponent_bits, spec.mantissa_bits)
        if own == fields and spec.signed and spec.specials is Specials.NONE:
            return spec
    name = f"f{sum(fields) + 1}E{exponent_bits}M{mantissa_bits}Finite"
    bias = (1 << (exponent_bits - 1)) - 1
    return FloatSpec(name, *fields, bias, source="LLM-FP4 (arXiv 2310.16836), all codes finite")


def paper_formats(bits: int) -> tuple[FloatSpec, ...]:
    """Return the formats that LLM-FP4 chooses among, those with the widest exponent first.

    E3M0 to E1M2 at 4 bits, E5M0 to E1M4 at 6, and E5M2 to E1M6 at 8.

    Raises:
        FormatError: If ``bits`` is not 4, 6 or 8.
    """
    if bits not in _SPLITS:
        raise FormatError(f"LLM-FP4 has formats of 4, 6 and 8 bits, not of {bits}.")
    return tuple(finite_format(bits - 1 - m, m) for m in _SPLITS[bits])


def bias_of(largest: Tensor, spec: FloatSpec) -> Tensor:
    """Return the real bias with which a format ends at ``largest`` (LLM-FP4, Eq. 7).

    A value is ``2**(p - bias) * (1 + f)``, so the bias is the one of the format less the binary
    logarithm of its scale: ``spec.bias - log2(largest / spec.max)``.

    Args:
        largest: The clip, any shape and floating-point dtype; infinite for 0.
        spec: The format.

    Returns:
        fp64, shape of ``largest``.
    """
    return spec.bias - torch.log2(largest.double() / spec.max)


def largest_of(bias: Tensor, spec: FloatSpec) -> Tensor:
    """Return the largest number of a format with a real bias: :func:`bias_of` undone, in fp64."""
    return spec.max * torch.exp2(spec.bias - bias.double())
