"""The clip of a weight: the range that is given up so that the rest is rounded more finely."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fpcompiler.numerics.scaling import dequantize, quantize
from fpcompiler.operand import Granularity, Operand

RATIOS: Final = tuple(1 - step / 20 for step in range(11))
"""The candidates: parts of the largest magnitude, 1 (no clip) to 0.5."""


def clip(x: Tensor, operand: Operand, *, layer: str = "") -> Tensor:
    """Return ``x`` with each row (or the tensor) clipped where its squared error is least.

    The error is that of the quantized values against ``x`` itself, so it is never more than
    without a clip. An operand without a real outer scale has nothing to search: blocks choose
    their scale by the rounding that the operand names.

    Args:
        x: ``[..., K]``, any floating-point dtype.
        operand: What the result will be quantized to.
        layer: Named in errors.

    Returns:
        A tensor like ``x``.

    Raises:
        NumericsError: As :func:`fpcompiler.numerics.quantize` does.
    """
    if operand.outer is None or not x.numel():
        return x
    axes = tuple(range(x.ndim)) if operand.outer.granularity is Granularity.TENSOR else (-1,)
    amax = x.abs().amax(axes, keepdim=True)
    best = torch.ones_like(amax)
    least = torch.full_like(amax, torch.inf, dtype=torch.float32)
    for ratio in RATIOS:
        values = dequantize(*quantize(_clamp(x, amax * ratio), operand, layer=layer), operand)
        error = values.sub_(x).square_().sum(axes, keepdim=True)
        best = torch.where(error < least, ratio, best)
        least = torch.minimum(error, least)
    return _clamp(x, amax * best)


def _clamp(x: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, -limit), limit)
