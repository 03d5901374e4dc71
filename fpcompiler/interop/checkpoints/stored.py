"""A quantized layer as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpcompiler.interop.checkpoints.arguments import InputKind
from fpcompiler.interop.checkpoints.layouts import Layout
from fpcompiler.numerics import dequantize_packed
from fpcompiler.operand import Operand


@dataclass(frozen=True)
class StoredLayer:
    """The weight of one layer and the static scale of its input.

    Attributes:
        name: Module path.
        layout: How it is stored.
        operand: What the weight is.
        codes: uint8 ``[N, bytes]``, packed.
        scale: Codes of the block scales, uint8 ``[N, K / block]``.
        outer: The scale of the tensor, fp32 ``[1, 1]``: codes are multiplied by it. None if the
            format has none.
        input: What the input is quantized to; None: nothing.
        input_outer: The static scale of the input's tensor, fp32 ``[1, 1]``, or None.
        numbers: The scales of tensors as the file has them, reciprocal or not, by name.
    """

    name: str
    layout: Layout
    operand: Operand
    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None
    input: InputKind | None = None
    input_outer: Tensor | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Length of a row."""
        return self.layout.width(self.codes.shape[1])

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The scale of each level, as :func:`fpcompiler.numerics.quantize` returns them."""
        return (self.scale,) if self.outer is None else (self.outer, self.scale)

    def dequantized(self) -> Tensor:
        """Return the values of the weight, fp32 ``[N, K]``."""
        return dequantize_packed(self.codes, self.scales, self.operand, self.k)


def direct(number: Tensor, layout: Layout) -> Tensor:
    """Return the scale of a tensor, fp32 ``[1, 1]``, from what the format stores for it."""
    value = number.to(torch.float32).reshape(1, 1)
    return 1 / value if layout.reciprocal else value.clone()


def reciprocal_of(scale: Tensor, codes: Tensor) -> Tensor | None:
    """Return the number whose division does what multiplying by a scale does, if there is one.

    ``s / G`` and ``s * g`` are both rounded to fp32 by those who read a checkpoint, so that a
    reciprocal is exact only if it gives the same number for every block scale ``s`` there is. It
    always is for powers of two. For other scales one in five has one (measured).

    Args:
        scale: ``g``, fp32 ``[1, 1]``.
        codes: The block scales, E4M3 codes as bytes.

    Returns:
        ``G``, fp32 ``[1]``, or None.
    """
    used = torch.unique(codes).view(torch.float8_e4m3fn).to(torch.float32)
    middle = (1 / scale.reshape(1)).to(torch.float32)
    below = torch.nextafter(middle, torch.zeros(1))
    above = torch.nextafter(middle, torch.full((1,), float("inf")))
    for number in (middle, below, above):
        back = (1 / number).to(torch.float32)
        if bool((used / number == used * scale.reshape(1)).all()) and bool(back == scale):
            return number
    return None
