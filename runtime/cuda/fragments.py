"""What kernels of packed weights multiply, and weights as they read them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.fragment_layout import (
    Order,
    e4m3_scales,
    fragment_codes,
    fragment_scales,
    power_scales,
)
from fpcompiler.numerics.packing import unpack
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.stored import BF16, E4M3, I8, integer_shift, why_not
from fpcompiler.runtime.cuda.weights import KernelWeights, outer_scale

_E2M1: Final = "f4E2M1FN"
_BITS: Final = 4
_MOST_INTEGER: Final = 63
"""The largest magnitude of a weight that kernels hold in a byte beside an offset as large."""
_BLOCKS: Final = ("", "block16:f8E4M3FN", "block32:f8E8M0FNU")


class Mode(enum.Enum):
    """What the tensor cores multiply."""

    INTEGERS = "i8"
    """Bytes that are the values times a power of two; sums are exact."""
    E4M3 = "e4m3"
    """FP8; from few rows of activations, bf16."""
    BF16 = "bf16"
    """Values times the scales of their blocks, which bf16 holds exactly."""

    @property
    def element(self) -> str:
        """The form of the activations, a name in :data:`fpcompiler.runtime.cuda.stored.STORED`."""
        return {Mode.INTEGERS: I8, Mode.E4M3: E4M3, Mode.BF16: BF16}[self]

    @property
    def order(self) -> Order:
        """How the weights are stored."""
        return Order.HALVES if self is Mode.BF16 else Order.BYTES


def mode_of(weight: Operand, activation: Operand | None) -> Mode | None:
    """Return how kernels multiply a layer whose weights stay packed, or None if there are none.

    Integers are taken where both operands are some on a scale per row and per token: such sums are
    exact, and they are the fastest. FP8 comes next, and bf16 holds the values of all blocks.

    Args:
        weight: The weights' operand.
        activation: The activations' operand; None for plain bf16.
    """
    block = weight.block
    if (f"block{block.block}:{block.format}" if block else "") not in _BLOCKS:
        return None
    if activation is None:
        return Mode.BF16 if weight.format.name == _E2M1 else None
    modes = (Mode.INTEGERS, Mode.E4M3, Mode.BF16)
    return next((mode for mode in modes if _computes(mode, weight, activation)), None)


def _computes(mode: Mode, weight: Operand, activation: Operand) -> bool:
    """Return whether kernels of a mode read both operands without rounding them."""
    if not decodes(mode, weight.format) or (weight.block and mode is not Mode.BF16):
        return False
    if mode is Mode.E4M3 and activation.block:
        return False
    return activation.format.name == mode.element or not why_not(activation, mode.element)


def decodes(mode: Mode, weight: FloatSpec) -> bool:
    """Return whether kernels of a mode decode weights of a format."""
    if mode is not Mode.INTEGERS:
        return weight.name == _E2M1
    largest = weight.max * 2 ** integer_shift(weight)
    return weight.storage_bits == _BITS and largest <= _MOST_INTEGER


def fragment_weights(w: Sequence[Tensor], operand: Operand, k: int, mode: Mode) -> KernelWeights:
    """Return weights as kernels of a mode read them.

    Args:
        w: ``[packed [N, bytes], *scales]``, on the device of the kernels.
        operand: What ``w`` is.
        k: Length of a row.
        mode: What the kernels multiply.
    """
    codes = unpack(w[0], operand.format.storage_bits, k)
    row, alpha = outer_scale(w, operand)
    scales = None
    if mode is Mode.INTEGERS:
        alpha *= 2.0 ** -integer_shift(operand.format)
    if operand.block is not None:
        block = operand.block.block
        if operand.block.format == "f8E8M0FNU":
            bytes_, rest = power_scales(w[-1])
            row = rest if row is None else row * rest
        else:
            bytes_, factor = e4m3_scales(w[-1])
            alpha *= factor
            # A scale of zero makes zeros of its block, whatever its codes are.
            zero = w[-1].eq(0).repeat_interleave(block, dim=1)[:, :k]
            codes = codes.masked_fill(zero, 0)
        scales = fragment_scales(bytes_, block)
    stored = fragment_codes(codes, mode.order)
    return KernelWeights(stored, scales, row, alpha, w[0].shape[0])
