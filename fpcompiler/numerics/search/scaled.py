"""Quantization with a scale that is given, for instance found by a search."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.given import quantize_with
from fpcompiler.numerics.packing import pack
from fpcompiler.numerics.rounding import round_into
from fpcompiler.numerics.scratch import Scratch, chunks
from fpcompiler.operand import Granularity, Operand, ScaleLevel


def quantize_with_scale(x: Tensor, scale: Tensor, spec: FloatSpec, *, layer: str = "") -> Tensor:
    """Return the codes of ``x / scale``; beyond the largest number of the format they saturate.

    With the scale that :func:`fpcompiler.numerics.quantize` finds, these are its codes.

    Args:
        x: ``[..., K]``, any floating-point dtype.
        scale: fp32 ``[..., 1]`` like ``x``, or of one value for the whole tensor; at least
            ``2**-126``.
        spec: The element format.
        layer: Named in errors.

    Returns:
        uint8, shape of ``x``, one code a byte.

    Raises:
        NumericsError: If the scale does not fit ``x`` or is no scale, or ``x`` is not
            floating-point or holds NaN or infinity.
    """
    _check(x, scale, layer)
    operand = Operand(spec, (ScaleLevel(Granularity.ROW),))
    own = scale.view((1,) * x.ndim) if scale.numel() == 1 else scale
    return quantize_with(x, (own,), operand, layer=layer)


def quantize_packed_with_scale(
    x: Tensor, scale: Tensor, spec: FloatSpec, *, layer: str = ""
) -> Tensor:
    """Return the codes of :func:`quantize_with_scale`, packed.

    Returns:
        uint8 ``[..., packed_bytes(K, bits)]``.

    Raises:
        NumericsError: As :func:`quantize_with_scale` does.
    """
    return pack(quantize_with_scale(x, scale, spec, layer=layer), spec.storage_bits)


def round_scaled(value: Tensor, scale: Tensor, spec: FloatSpec) -> Tensor:
    """Return the values that ``value`` is quantized to with a scale.

    Args:
        value: fp32 ``[R, K]``.
        scale: fp32 ``[R, 1]`` or ``[1, 1]``.
        spec: The element format.

    Returns:
        fp32 ``[R, K]``: ``decode(encode(value / scale)) * scale``.
    """
    result, scratch = torch.empty_like(value), Scratch(value.device)
    for part in chunks(value.shape[0], value.shape[1], value.device):
        own = scale[part] if scale.shape[0] > 1 else scale
        quotient = scratch.take("y", value[part].shape, torch.float32)
        torch.div(value[part], own, out=quotient)
        round_into(result[part], quotient, spec, scratch)
        result[part].mul_(own)
    return result


def _check(x: Tensor, scale: Tensor, layer: str) -> None:
    wanted = [*x.shape[:-1], 1]
    if scale.dtype != torch.float32 or (scale.numel() != 1 and list(scale.shape) != wanted):
        raise NumericsError(
            f"{describe_layer(layer)}: the scale of {list(x.shape)} values is fp32 of one value or "
            f"{wanted}, not {scale.dtype} {list(scale.shape)}."
        )
    if not bool(((scale >= 2.0**-126) & scale.isfinite()).all()):
        raise NumericsError(
            f"{describe_layer(layer)}: a scale must be finite and at least 2**-126."
        )
