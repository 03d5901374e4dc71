"""Quantization of activations inside of a graph that is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpcompiler import numerics
from fpcompiler.operand import Operand


def fake_quantize(x: Tensor, operand: str, scales: Sequence[Tensor], layer: str) -> Tensor:
    """Return values rounded to what an operand can hold; the derivative is that of ``x``.

    The straight-through estimator (arXiv 1308.3432): rounding has no derivative of its own.

    Args:
        x: ``[..., K]``.
        operand: Text of the element format and scale levels.
        scales: Of each level, as given; none: they are computed from ``x``.
        layer: Named in errors.

    Raises:
        NumericsError: If ``x`` holds NaN or infinity.
    """
    result = _StraightThrough.apply(x, operand, tuple(scales), layer)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, text: str, scales: tuple[Tensor, ...], layer: str) -> Tensor:
        operand = Operand.parse(text)
        if scales:
            codes = numerics.quantize_with(x, scales, operand, layer=layer)
        else:
            codes, scales = numerics.quantize(x, operand, layer=layer)
        return numerics.dequantize(codes, scales, operand).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None
