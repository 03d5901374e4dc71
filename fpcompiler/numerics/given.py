"""Quantization with scales that are given: found by a search or in calibration, or stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.blocks import Blocks
from fpcompiler.numerics.rounding import encode
from fpcompiler.numerics.scales import EXPONENT_MASK, block_scale
from fpcompiler.numerics.scaling import expand_scale, not_finite
from fpcompiler.numerics.scratch import Scratch
from fpcompiler.operand import Granularity, Operand


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


def quantize_within(
    x: Tensor, outer: Tensor, operand: Operand, *, layer: str = ""
) -> tuple[Tensor, Tensor]:
    """Quantize with a scale of the tensor that is given; those of blocks are computed.

    It is what ``quantize`` does with the scale of the tensor that it finds. A block whose largest
    value is beyond what a scale can reach within ``outer`` saturates.

    Args:
        x: ``[..., K]``, any floating-point dtype.
        outer: fp32, one number.
        operand: With a scale of the tensor, and scales of blocks in a format.
        layer: Named in errors.

    Returns:
        Codes, uint8 of the shape of ``x``, and the scales of blocks, uint8 ``[..., blocks]``.

    Raises:
        NumericsError: If ``x`` is not floating-point or holds NaN or infinity, or the operand has
            other levels.
    """
    scale = scales_within(x, outer, operand, layer=layer)
    given = (outer.reshape((1,) * x.ndim), scale)
    return quantize_with(x, given, operand, layer=layer), scale


def scales_within(x: Tensor, outer: Tensor, operand: Operand, *, layer: str = "") -> Tensor:
    """Return the scales of blocks, uint8 ``[..., blocks]``; see :func:`quantize_within`.

    Raises:
        NumericsError: As :func:`quantize_within` does.
    """
    level = operand.block
    if not is_nested(operand) or level is None or level.spec is None:
        raise NumericsError(f"{operand} has no scale of the tensor with scales of blocks in it.")
    if not x.is_floating_point() or not x.ndim:
        raise NumericsError(
            f"{describe_layer(layer)}: only floating-point tensors with at least one axis can be "
            f"quantized, not {x.dtype} {list(x.shape)}."
        )
    blocks = -(-x.shape[-1] // level.block)
    if not x.numel():
        return x.new_ones((*x.shape[:-1], blocks), dtype=torch.uint8)
    rows = Blocks(x.detach().reshape(-1, x.shape[-1]), level.block, Scratch(x.device))
    bits = rows.largest()
    if int(bits.max()) >= EXPONENT_MASK:
        raise not_finite(operand, layer)
    scale = block_scale(rows, bits.view(torch.float32), outer.reshape(1, 1, 1), operand)
    return encode(scale, level.spec).view(*x.shape[:-1], blocks)


def is_nested(operand: Operand) -> bool:
    """Return whether an operand has a scale of the tensor and scales of blocks in a format."""
    outer, block = operand.outer, operand.block
    is_tensor = outer is not None and outer.granularity is Granularity.TENSOR
    return is_tensor and block is not None and not block.is_real


def power_of_two(amax: float, operand: Operand) -> Tensor:
    """Return the least power of two that, as scale of the tensor, clips nothing up to ``amax``.

    Dividing by it and multiplying by it are both exact, and so is its reciprocal. It costs at most
    one of the 15 binades that E4M3 scales of blocks have, and no precision.

    Args:
        amax: The largest magnitude; 0 gives the scale 1.
        operand: With a scale of the tensor, and E4M3 scales of blocks.

    Returns:
        fp32 ``[1, 1]``.
    """
    level = operand.block
    assert level is not None
    assert level.spec is not None
    ratio = torch.tensor([[amax or 1.0]], dtype=torch.float64)
    if amax:
        ratio = ratio / (operand.format.max * level.spec.max)
    mantissa, exponent = torch.frexp(ratio)  # ratio = mantissa * 2**exponent, mantissa < 1
    exponent = exponent - (mantissa == 0.5).int()
    # The least product with a scale of a block must not be subnormal.
    exponent = exponent.clamp(min=-126 + 9)
    return torch.ldexp(torch.ones(1, 1, dtype=torch.float64), exponent).to(torch.float32)


def shared_power_scales(
    weights: Sequence[Tensor], operand: Operand, *, layer: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """Return the scales of several weights with one scale of the tensor, a power of two.

    Args:
        weights: ``[N, K]`` each.
        operand: With a scale of the tensor, and E4M3 scales of blocks.
        layer: Named in errors.

    Returns:
        For each weight its scales, as :func:`fpcompiler.numerics.quantize` returns them.

    Raises:
        NumericsError: If a weight holds NaN or infinity.
    """
    largest = [float(w.detach().abs().max()) if w.numel() else 0.0 for w in weights]
    if not all(amax < float("inf") for amax in largest):
        raise not_finite(operand, layer)
    outer = power_of_two(max(largest), operand)
    return [
        (outer.to(w.device), scales_within(w, outer.to(w.device), operand, layer=layer))
        for w in weights
    ]
