"""Quantization with the scale levels of an operand: this module defines what a quantized value is.

For an element format with largest number ``max``, and ``amax`` the largest magnitude in a group:

* the real scale of a tensor, row, token or block is ``amax / max``, or ``amax / (max * 448)`` if an
  E4M3 scale per block follows;
* the scale of a block in a scale format is ``amax / (max * outer)``, rounded as its level says;
* ``total`` is the product of the levels, coarsest first; the code of ``x`` is
  ``encode(x / total)`` and stands for ``decode(code) * total``.

A group of zeros has scale 1. All of it is IEEE fp32, each operation rounded once. Scales are so
bounded that ``total >= 2**-126``: the result does not depend on a flush-to-zero mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.blocks import Blocks
from fpcompiler.numerics.compiled import quantize_rows, quantizer
from fpcompiler.numerics.packing import decode_packed, pack_into, packed_bytes
from fpcompiler.numerics.rounding import decode, encode, encode_into
from fpcompiler.numerics.scales import EXPONENT_MASK, Quotient, block_scale, real_scale
from fpcompiler.numerics.scratch import Scratch
from fpcompiler.operand import Granularity, Operand, ScaleLevel


def quantize(x: Tensor, operand: Operand, *, layer: str = "") -> tuple[Tensor, tuple[Tensor, ...]]:
    """Quantize a tensor along its last axis.

    Args:
        x: ``[..., K]``, any floating-point dtype.
        operand: Element format and scale levels.
        layer: Named in errors.

    Returns:
        Codes, uint8 of the shape of ``x``, and one scale tensor per level: fp32 for a real level
        and uint8 codes otherwise; ``[1] * ndim`` per tensor, ``[..., 1]`` per row or token,
        ``[..., ceil(K / B)]`` per block of B, where the last block may be short.

    Raises:
        NumericsError: If ``x`` is not floating-point, has no axis, or holds NaN, infinity, or fp64
            values that fp32 cannot hold.
    """
    return _quantize(x, operand, layer, bits=8)


def quantize_packed(
    x: Tensor, operand: Operand, *, layer: str = ""
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Quantize and pack: the same as :func:`quantize` and then ``pack``, in one go over memory.

    Returns:
        uint8 ``[..., packed_bytes(K, bits)]``, and the scales of :func:`quantize`.

    Raises:
        NumericsError: As :func:`quantize` does.
    """
    return _quantize(x, operand, layer, operand.format.storage_bits)


def dequantize(
    codes: Tensor,
    scales: tuple[Tensor, ...],
    operand: Operand,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``decode(code) * total``: the values that the result of :func:`quantize` stands for.

    A value that was rounded up beyond the range of ``dtype`` is infinite.

    Args:
        codes: uint8 ``[..., K]``, one code a byte.
        scales: As returned by :func:`quantize`.
        operand: Element format and scale levels.
        dtype: Of the result; the arithmetic is fp32.

    Raises:
        NumericsError: If the scales do not fit the operand or K.
    """
    value = decode(codes, operand.format)
    if operand.levels:
        scale_(value, scales, operand)
    return value.to(dtype)


def dequantize_packed(
    packed: Tensor,
    scales: tuple[Tensor, ...],
    operand: Operand,
    k: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the same as ``dequantize(unpack(packed), ...)``, without the codes in between.

    Args:
        packed: uint8 ``[..., packed_bytes(k, bits)]``.
        scales: As returned by :func:`quantize_packed`.
        operand: Element format and scale levels.
        k: Codes in a row.
        out: Optional memory for the result: fp32 ``[..., k]``, contiguous.

    Returns:
        fp32 ``[..., k]``.

    Raises:
        NumericsError: If something does not fit the operand or ``k``.
    """
    value = decode_packed(packed, operand.format, k, out=out)
    if operand.levels:
        scale_(value, scales, operand)
    return value


def scale_(value: Tensor, scales: tuple[Tensor, ...], operand: Operand) -> None:
    """Multiply fp32 values ``[..., K]`` in place by the product of all levels, coarsest first.

    Raises:
        NumericsError: If the scales do not fit the operand or K.
    """
    k = value.shape[-1]
    total = _total(scales, operand, k)
    if operand.block is None:
        value.mul_(total)
        return
    width = operand.block.block
    whole = k // width
    blocks = value[..., : whole * width].view(*value.shape[:-1], whole, width)
    blocks.mul_(total[..., :whole, None])
    value[..., whole * width :].mul_(total[..., whole:])


def expand_scale(scales: tuple[Tensor, ...], operand: Operand, k: int) -> Tensor:
    """Return the product of all levels, coarsest first: fp32, broadcastable to ``[..., k]``.

    Raises:
        NumericsError: If the scales do not fit the operand or ``k``, or there are none.
    """
    total = _total(scales, operand, k)
    if operand.block is None:
        return total
    return total.repeat_interleave(operand.block.block, dim=-1)[..., :k]


def _total(scales: tuple[Tensor, ...], operand: Operand, k: int) -> Tensor:
    """Return the product of all levels, fp32 ``[..., blocks]`` or ``[..., 1]``."""
    if len(scales) != len(operand.levels) or not scales:
        raise NumericsError(f"{operand} has {len(operand.levels)} scales, not {len(scales)}.")
    factors = []
    for scale, level in zip(scales, operand.levels, strict=True):
        blocks = -(-k // level.block) if level.block else 1
        if scale.shape[-1] != blocks:
            raise NumericsError(
                f"{k} values with a scale {level} have {blocks} scales a row, "
                f"not {scale.shape[-1]}."
            )
        factors.append(scale if level.spec is None else decode(scale, level.spec))
    return math.prod(factors[1:], start=factors[0])


def _quantize(
    x: Tensor, operand: Operand, layer: str, bits: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Quantize into codes that take ``bits`` bits each."""
    if not x.is_floating_point() or not x.ndim:
        raise NumericsError(
            f"{describe_layer(layer)}: only floating-point tensors with at least one axis can be "
            f"quantized, not {x.dtype} {list(x.shape)}."
        )
    k = x.shape[-1]
    size = (*x.shape[:-1], packed_bytes(k, bits))
    packed = torch.empty(size, dtype=torch.uint8, device=x.device)
    scales = tuple(_empty_scale(x, level) for level in operand.levels)
    if not x.numel():
        return packed, scales
    rows = x.detach().reshape(-1, k)
    native = quantizer(rows, operand)
    if native is not None:
        if not quantize_rows(native, rows, operand, bits, packed, scales):
            raise not_finite(operand, layer)
        return packed, scales
    width = operand.block.block if operand.block else k
    blocks = Blocks(rows, width, Scratch(x.device))
    factors = _scales(blocks, operand, layer)
    for scale, level, factor in zip(scales, operand.levels, factors, strict=True):
        stored = factor if level.spec is None else encode(factor, level.spec)
        scale.copy_(stored.view(scale.shape))
    _encode_blocks(packed.view(-1, size[-1]), blocks, factors, operand.format, bits)
    return packed, scales


def _empty_scale(x: Tensor, level: ScaleLevel) -> Tensor:
    """Return memory for the scales of a level, set to 1 in case there is nothing to scale."""
    dtype = torch.float32 if level.is_real else torch.uint8
    if level.granularity is Granularity.TENSOR:
        return torch.ones((1,) * x.ndim, dtype=dtype, device=x.device)
    count = -(-x.shape[-1] // level.block) if level.block else 1
    return torch.ones((*x.shape[:-1], count), dtype=dtype, device=x.device)


def _scales(blocks: Blocks, operand: Operand, layer: str) -> list[Tensor]:
    """Return the scale of each level as fp32 ``[R or 1, blocks or 1, 1]``."""
    bits = blocks.largest()
    if int(bits.max()) >= EXPONENT_MASK:
        raise not_finite(operand, layer)
    scales: list[Tensor] = []
    if operand.outer:
        axes = (0, 1) if operand.outer.granularity is Granularity.TENSOR else (1,)
        scales.append(real_scale(bits.amax(axes, keepdim=True).view(torch.float32), operand))
    amax = bits.view(torch.float32)
    if operand.block and operand.block.is_real:
        scales.append(real_scale(amax, operand))
    elif operand.block:
        scales.append(block_scale(blocks, amax, scales[0] if scales else None, operand))
    return scales


def not_finite(operand: Operand, layer: str) -> NumericsError:
    """Return the error for values that are NaN or infinite."""
    return NumericsError(
        f"{describe_layer(layer)}: input holds NaN/Inf (or values beyond fp32) and cannot be "
        f"quantized to {operand}. Check the weights and the inputs, or skip the layer."
    )


def _encode_blocks(
    packed: Tensor, blocks: Blocks, scales: list[Tensor], element: FloatSpec, bits: int
) -> None:
    """Write the packed codes ``[R, bytes]`` of ``value / total``, chunk by chunk."""
    quotients = Quotient(math.prod(scales[1:], start=scales[0])) if scales else None
    scratch, k = blocks.scratch, blocks.rows.shape[1]
    for part in blocks.parts():
        value = blocks.load(part)
        quotient = scratch.take("y", value.shape, torch.float32)
        if quotients is None:
            quotient.copy_(value)
        else:
            quotients.into(quotient, value, part)
        codes = scratch.take("codes", value.shape, torch.uint8)
        encode_into(codes, quotient, element, scratch)
        pack_into(packed[part], codes.flatten(1)[:, :k], bits, scratch)
