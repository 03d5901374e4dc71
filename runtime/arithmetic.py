"""How the native library sums a layer: which arithmetic holds every value exactly."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import torch

from fpcompiler.formats import FloatSpec
from fpcompiler.native import INSTRUCTION_SETS
from fpcompiler.native.linear import Arithmetic
from fpcompiler.operand import Operand

BF16_INSTRUCTIONS: Final = INSTRUCTION_SETS.index("AVX-512 BF16")
"""What bf16 arithmetic needs."""

_BF16_DIGITS: Final = 8
_MOST: Final = 1 << 31


@lru_cache(maxsize=64)
def integers_of(spec: FloatSpec, limit: int = 127) -> tuple[int, ...] | None:
    """Return the values of all codes times the least power of two that makes them integers.

    None if one of them would be above ``limit``, or is no number.
    """
    values = spec.values
    if not all(math.isfinite(value) for value in values):
        return None
    steps = 1 / spec.smallest
    if max(abs(value) for value in values) * steps > limit:
        return None
    return tuple(int(value * steps) for value in values)


def arithmetic_for(
    x_operand: Operand | None,
    w_operand: Operand,
    k: int,
    dtype: torch.dtype,
    instructions: int,
) -> Arithmetic:
    """Return how a layer is summed: the fastest arithmetic that holds every value exactly.

    Args:
        x_operand: The activations; None if they are not quantized.
        w_operand: The weights.
        k: Length of a row.
        dtype: Of the activations; it counts only if they are not quantized.
        instructions: What the processor has, an index of ``INSTRUCTION_SETS``.
    """
    floats = Arithmetic.BF16 if instructions == BF16_INSTRUCTIONS else Arithmetic.FLOAT32
    if x_operand is None:
        return floats if dtype == torch.bfloat16 else Arithmetic.FLOAT32
    w, x = integers_of(w_operand.format), integers_of(x_operand.format)
    if w is not None and x is not None and 2 * max(w) * max(x) * k < _MOST:
        return Arithmetic.INT8
    digits = x_operand.format.mantissa_bits + 1
    if x_operand.block:
        scale = x_operand.block.spec
        digits += _BF16_DIGITS if scale is None else scale.mantissa_bits + (scale.mantissa_bits > 0)
    return floats if digits <= _BF16_DIGITS else Arithmetic.FLOAT32


def takes(w_operand: Operand, n: int, k: int) -> bool:
    """Return whether the library multiplies weights of this kind: codes with a sign and zero."""
    spec = w_operand.format
    return spec.signed and spec.zero and n > 0 and k > 0
