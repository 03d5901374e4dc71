"""The linear layer of two quantized operands in plain torch: it defines what the result is.

With ``x = decode(x codes) * x block scale`` and ``w`` likewise, both fp32::

    y = (x @ w.T) * x outer scale * w outer scale + bias

where the outer scale is the real one over the tensor, token or row. It stays outside of the sum
because hardware applies it there, in the epilogue; and because the products of codes alone are
integers times a power of two, whose sum is exact in fp32 whatever the order of the additions.
``y`` is rounded to the type of the result, and where the layer computes an activation too, it is
torch's own of that (:func:`fpcompiler.runtime.fused.activate`): the same bits as in two operations.
So is the sum with a residual, of which nothing is known here (``fused.add_residual``).

Every other backend is checked against this one. It takes torch's fp32 product as it is by default:
``torch.set_float32_matmul_precision`` must be left at ``highest``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fpcompiler.numerics import dequantize, dequantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused

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
    activation: str = "",
) -> Tensor:
    """Return ``x @ w.T + bias`` of quantized operands, or an activation of it.

    Args:
        x: ``[values [..., K]]`` of a floating-point dtype, or ``[codes [..., K], *scales]``.
        w: ``[packed [N, bytes], *scales]``, scales in storage form: ``[N, 1]`` per row,
            ``[N, ceil(K / B)]`` per block, ``[1, 1]`` per tensor.
        bias: ``[N]``, or None.
        x_operand: What ``x`` is; None if it is not quantized.
        w_operand: What ``w`` is.
        k: Length of a row.
        dtype: Of the result.
        activation: One of ``fused.ACTIVATIONS``; empty for none.

    Returns:
        ``[..., N]``, contiguous.
    """
    chunks = weight_chunks(w, w_operand, k)
    y = multiply(x, x_operand, chunks, bias, (w[0].shape[0], k), dtype)
    return fused.activate(y, activation)


def multiply(
    x: Sequence[Tensor],
    x_operand: Operand | None,
    chunks: Iterable[tuple[slice, Tensor, Tensor | None]],
    bias: Tensor | None,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the same for weights that are expanded already, some rows at a time.

    Args:
        x: ``[values [..., K]]``, or ``[codes [..., K], *scales]``.
        x_operand: What ``x`` is; None if it is not quantized.
        chunks: What :func:`weight_chunks` yields.
        bias: ``[N]``, or None.
        size: Of the weights: ``N`` and ``K``.
        dtype: Of the result.
    """
    n, k = size
    values, x_scale = _activation(x, x_operand, k)
    y = torch.empty(values.shape[0], n, dtype=dtype, device=values.device)
    # Autocast would turn the fp32 product into one of bf16.
    with torch.autocast(values.device.type, enabled=False):
        for rows, chunk, w_scale in chunks:
            part = values @ chunk.T
            for scale in (x_scale, w_scale):
                if scale is not None:
                    part.mul_(scale)
            y[:, rows] = part if bias is None else part.add_(bias[rows])
    return y.view(*x[0].shape[:-1], n)


def elements(operand: Operand) -> Operand:
    """Return the operand without its outer scale: what is summed are values of this one."""
    return Operand(operand.format, (operand.block,) if operand.block else ())


def _activation(
    x: Sequence[Tensor], operand: Operand | None, k: int
) -> tuple[Tensor, Tensor | None]:
    if operand is None:
        return x[0].reshape(-1, k).to(torch.float32), None
    inner = (x[-1],) if operand.block else ()
    values = dequantize(x[0], inner, elements(operand)).view(-1, k)
    return values, x[1].reshape(-1, 1) if operand.outer else None


def chunk_rows(n: int, k: int) -> int:
    """Return how many of ``n`` rows are expanded at a time."""
    return min(max(1, CHUNK_VALUES // max(1, k)), n)


def weight_chunks(
    w: Sequence[Tensor], operand: Operand, k: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield some rows, their elements as fp32, and their outer scale, ``[1, rows or 1]``.

    The elements are in memory that the next ones overwrite.
    """
    packed, *scales = w
    step = chunk_rows(len(packed), k)
    memory = torch.empty(step, k, dtype=torch.float32, device=packed.device)
    for start in range(0, len(packed), step or 1):
        rows = slice(start, start + step)
        # A scale of one row is the tensor's; it belongs to every chunk.
        own = [s[rows] if s.shape[0] == packed.shape[0] else s for s in scales]
        chunk = packed[rows]
        inner = (own[-1],) if operand.block else ()
        values = dequantize_packed(chunk, inner, elements(operand), k, out=memory[: len(chunk)])
        yield rows, values, own[0].T if operand.outer else None
