"""A second implementation, slow and plain: exact fractions and scalar fp32, no tensors.

It shares only ``FloatSpec.value`` and the parsed operand with the library.
"""

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from functools import lru_cache

import numpy as np

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.operand import Granularity, Operand, ScaleRounding

ML_DTYPES = {
    "f4E2M1FN": "float4_e2m1fn",
    "f6E2M3FN": "float6_e2m3fn",
    "f6E3M2FN": "float6_e3m2fn",
    "f8E3M4": "float8_e3m4",
    "f8E4M3FN": "float8_e4m3fn",
    "f8E5M2": "float8_e5m2",
    "f8E8M0FNU": "float8_e8m0fnu",
}
"""The formats that ml_dtypes has."""


@lru_cache
def magnitudes(spec: FloatSpec) -> list[float]:
    """Return the non-negative finite values, which are in order of their codes."""
    return [spec.value(code) for code in range(spec.max_code + 1)]


def nearest_code(x: float, spec: FloatSpec) -> int:
    """Return the code of the nearest value by comparing exact distances."""
    values = magnitudes(spec)
    sign = int(spec.signed and math.copysign(1.0, x) < 0) << spec.magnitude_bits
    size = abs(x) if spec.signed else max(x, 0.0)
    if size >= values[-1]:
        return sign | spec.max_code
    upper = bisect.bisect_right(values, size)
    if upper == 0:
        return sign
    below, above = Fraction(values[upper - 1]), Fraction(values[upper])
    to_below, to_above = Fraction(size) - below, above - Fraction(size)
    if to_below == to_above:
        return sign | (upper if above / (above - below) % 2 == 0 else upper - 1)
    return sign | (upper if to_above < to_below else upper - 1)


def quantize(x: np.ndarray, text: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Quantize ``[R, K]`` fp32 by the definition in ``fpcompiler.numerics.scaling``.

    Returns the codes, and per level the fp32 scales ``[R, scales a row]`` (a scale of the whole
    tensor repeated for each row).
    """
    operand = Operand.parse(text)
    rows, k = x.shape
    width = operand.block.block if operand.block else k
    count = -(-k // width)
    codes = np.zeros((rows, k), np.uint8)
    outer = np.ones((rows, 1), np.float32)
    inner = np.ones((rows, count), np.float32)
    for i in range(rows):
        group = x if _is_tensor(operand) else x[i]
        if operand.outer:
            outer[i] = _real(np.abs(group).max(), operand)
        for j in range(count):
            block = x[i, j * width : (j + 1) * width]
            total = np.float32(outer[i, 0])
            if operand.block:
                inner[i, j] = _block(block, outer[i, 0], operand)
                total = np.float32(total * inner[i, j])
            for n, value in enumerate(block):
                quotient = np.float32(value / total) if operand.levels else value
                codes[i, j * width + n] = nearest_code(float(quotient), operand.format)
    scales = [outer] if operand.outer else []
    return codes, [*scales, inner] if operand.block else scales


def _is_tensor(operand: Operand) -> bool:
    return operand.outer is not None and operand.outer.granularity is Granularity.TENSOR


def _real(amax: np.float32, operand: Operand) -> np.float32:
    if amax == 0:
        return np.float32(1)
    if operand.block and operand.block.format == "f8E4M3FN":
        return max(np.float32(amax / np.float32(operand.format.max * 448)), np.float32(2.0**-117))
    return max(np.float32(amax / np.float32(operand.format.max)), np.float32(2.0**-126))


def _block(block: np.ndarray, outer: np.float32, operand: Operand) -> np.float32:
    amax = np.abs(block).max()
    if amax == 0:
        return np.float32(1)
    if operand.block.is_real:
        return _real(amax, operand)
    limit = min(np.float32(operand.format.max) * outer, np.finfo(np.float32).max)
    ratio = np.float32(amax / limit)
    grid = _grid(operand, outer)
    below = max([s for s in grid if s <= ratio], default=grid[0])
    above = min([s for s in grid if s >= ratio], default=grid[-1])
    return {
        ScaleRounding.FLOOR: lambda: _floor(amax, outer, operand, grid, below),
        ScaleRounding.CEIL: lambda: above,
        ScaleRounding.RNE: lambda: _nearest_scale(ratio, operand, grid),
        ScaleRounding.MSE: lambda: (
            below
            if _error(block, outer, below, operand) < _error(block, outer, above, operand)
            else above
        ),
    }[operand.block.rounding]()


def _grid(operand: Operand, outer: np.float32) -> list[np.float32]:
    """Return the scales that a block may have, in order."""
    if operand.block.format == "f8E4M3FN":
        return [np.float32(v) for v in magnitudes(FORMATS["f8E4M3FN"])[1:]]
    lowest = max(-126, -126 - (math.frexp(float(outer))[1] - 1))
    return [np.float32(2.0**e) for e in range(lowest, 128)]


def _floor(amax, outer, operand, grid, below) -> np.float32:
    if operand.block.format == "f8E4M3FN":
        return below
    normal = max(float(np.float32(amax / outer)), 2.0**-126)
    exponent = math.frexp(normal)[1] - 1 - operand.format.max_exponent
    return max(np.float32(2.0 ** max(exponent, -126)), grid[0])


def _nearest_scale(ratio, operand, grid) -> np.float32:
    spec = FORMATS[operand.block.format]
    value = np.float32(spec.value(nearest_code(float(ratio), spec)))
    return max(value, grid[0])


def _error(block, outer, scale, operand) -> float | Fraction:
    total = np.float32(outer * scale)
    quotients = [np.float32(v / total) for v in block]
    values = [operand.format.value(nearest_code(float(q), operand.format)) for q in quotients]
    if operand.block.format == "f8E8M0FNU":
        errors = [Fraction(v) - Fraction(float(q)) for v, q in zip(values, quotients, strict=True)]
        return sum(e * e for e in errors) * Fraction(float(total)) ** 2
    errors = [np.float32(v) - q for v, q in zip(values, quotients, strict=True)]
    return math.fsum(float(np.float32(e * e)) for e in errors) * float(total) ** 2
