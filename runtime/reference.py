"""The linear layer of two quantized operands in plain torch: it defines what the result is.

With ``x = decode(x codes) * x block scale`` and ``w`` likewise, both fp32::

    y = (x @ w.T) * x outer scale * w outer scale + bias

where the outer scale is the real one over the tensor, token or row. It stays outside of the sum
because hardware applies it there, in the epilogue; and because the products of codes alone are
integers times a power of two, whose sum is exact in fp32 whatever the order of the additions.
Every other backend is checked against this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fpcompiler.numerics import dequantize, unpack
from fpcompiler.operand import Operand

CHUNK_VALUES = 1 << 20
"""Weight values that are expanded to fp32 at a time; what stays of a layer is its result."""


def linear(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    bias: Tensor | None,
    x_operand: Operand | None,
    w_operand: Operand,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``x @ w.T + bias`` of quantized operands.

    Args:
        x: ``[values [..., K]]`` of a floating-point dtype, or ``[codes [..., K], *scales]``.
        w: ``[packed [N, bytes], *scales]``, scales in storage form: ``[N, 1]`` per row,
            ``[N, ceil(K / B)]`` per block, ``[1, 1]`` per tensor.
        bias: ``[N]``, or None.
        x_operand: What ``x`` is; None if it is not quantized.
        w_operand: What ``w`` is.
        k: Length of a row.
        dtype: Of the result.

    Returns:
        ``[..., N]``, contiguous.
    """
    values, x_scale = _activation(x, x_operand, k)
    y = torch.empty(values.shape[0], w[0].shape[0], dtype=dtype, device=values.device)
    # Autocast would turn the fp32 product into one of bf16.
    with torch.autocast(values.device.type, enabled=False):
        for rows, chunk, w_scale in _weight_chunks(w, w_operand, k):
            part = values @ chunk.T
            for scale in (x_scale, w_scale):
                if scale is not None:
                    part.mul_(scale)
            y[:, rows] = part if bias is None else part.add_(bias[rows])
    return y.view(*x[0].shape[:-1], w[0].shape[0])


def elements(codes: Tensor, scales: Sequence[Tensor], operand: Operand) -> Tensor:
    """Return the fp32 values inside of the outer scale: ``decode(codes) * block scale``."""
    if operand.block is None:
        return dequantize(codes, (), Operand(operand.format))
    return dequantize(codes, (scales[-1],), Operand(operand.format, (operand.block,)))


def _activation(
    x: Sequence[Tensor], operand: Operand | None, k: int
) -> tuple[Tensor, Tensor | None]:
    if operand is None:
        return x[0].reshape(-1, k).to(torch.float32), None
    values = elements(x[0], x[1:], operand).view(-1, k)
    return values, x[1].reshape(-1, 1) if operand.outer else None


def _weight_chunks(
    w: Sequence[Tensor], operand: Operand, k: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield some rows, their elements as fp32, and their outer scale, ``[1, rows or 1]``."""
    packed, *scales = w
    step = max(1, CHUNK_VALUES // max(1, k))
    for start in range(0, packed.shape[0], step):
        rows = slice(start, start + step)
        # A scale of one row is the tensor's; it belongs to every chunk.
        own = [s[rows] if s.shape[0] == packed.shape[0] else s for s in scales]
        codes = unpack(packed[rows], operand.format.storage_bits, k)
        yield rows, elements(codes, own, operand), own[0].T if operand.outer else None
