"""How a quantized value is expressed: all that the two styles of files differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from torch import Tensor

from fpcompiler.formats import FloatSpec
from fpcompiler.interop.onnx.arithmetic import Grouped, Rounded, join
from fpcompiler.interop.onnx.builder import Builder
from fpcompiler.numerics.rounding import value_table
from fpcompiler.operand import Operand

__all__ = ["StoredWeight", "Style", "look_up", "scaled_elements"]


@dataclass(frozen=True)
class StoredWeight:
    """A weight as an artifact has it, without its outer scale.

    Attributes:
        codes_name: What the constant with the codes is called.
        block_name: What the constant with the scales of blocks is called.
        packed: The codes, uint8 ``[N, bytes]``.
        block: The scales of blocks, ``[N, blocks]`` in storage form, or None.
        operand: Element format, and the level of the blocks if there is one.
        k: Values in a row.
    """

    codes_name: str
    block_name: str
    packed: Tensor
    block: Tensor | None
    operand: Operand
    k: int


class Style(Protocol):
    """Expresses quantized values."""

    def weight(self, b: Builder, weight: StoredWeight) -> ir.Value:
        """Return elements times block scales, fp32 ``[N, K]``.

        Raises:
            ExportError: If ONNX cannot hold the elements.
        """

    def activation(
        self, b: Builder, values: Grouped, rounded: Rounded, operand: Operand
    ) -> ir.Value:
        """Return elements times block scales, in the shape of ``values.x``."""


def look_up(b: Builder, codes: ir.Value, spec: FloatSpec) -> ir.Value:
    """Return the values of codes, one code a byte."""
    table = b.table(f"{spec.name}.values", np.asarray(value_table(spec)))
    return b.op("Gather", table, b.cast(codes, ir.DataType.INT32))


def scaled_elements(b: Builder, values: Grouped, rounded: Rounded, operand: Operand) -> ir.Value:
    """Return elements times block scales from what :func:`.arithmetic.quantize` gave."""
    if operand.block is None or rounded.block is None:
        return rounded.elements
    product = b.op("Mul", rounded.elements, rounded.block)
    return join(b, values, product, operand)
