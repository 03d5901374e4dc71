"""Quantization with scales that are given: found by a search, or in calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.rounding import encode
from fpcompiler.numerics.scaling import expand_scale
from fpcompiler.operand import Operand


def quantize_with(
    x: Tensor, scales: tuple[Tensor, ...], operand: Operand, *, layer: str = ""
) -> Tensor:
    """Return the codes of ``x`` for given scales; values beyond the largest number saturate.

    With the scales that :func:`fpcompiler.numerics.quantize` finds, these are its codes.

    Args:
        x: ``[..., K]``, any floating-point dtype.
        scales: One for each level, in the form that :func:`fpcompiler.numerics.quantize` returns.
        operand: Element format and scale levels.
        layer: Named in errors.

    Returns:
        uint8, shape of ``x``, one code a byte.

    Raises:
        NumericsError: If ``x`` is not floating-point or holds NaN or infinity, or the scales do not
            fit.
    """
    if not x.is_floating_point() or not x.ndim:
        raise NumericsError(
            f"{describe_layer(layer)}: only floating-point tensors with at least one axis can be "
            f"quantized, not {x.dtype} {list(x.shape)}."
        )
    value = x.detach().to(torch.float32)
    if not bool(value.isfinite().all()):
        raise NumericsError(
            f"{describe_layer(layer)}: input holds NaN/Inf (or values beyond fp32) and cannot be "
            f"quantized to {operand}. Check the weights and the inputs, or skip the layer."
        )
    if operand.levels:
        value = value / expand_scale(scales, operand, x.shape[-1])
    return encode(value, operand.format)
