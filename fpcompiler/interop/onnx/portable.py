"""The portable style: bytes, look-up tables and elementary operations, as opset 18 has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from fpcompiler.formats import FloatSpec
from fpcompiler.interop.onnx.arithmetic import Grouped, Rounded
from fpcompiler.interop.onnx.builder import Builder
from fpcompiler.interop.onnx.styles import StoredWeight, look_up, scaled_elements
from fpcompiler.numerics import pack, unpack
from fpcompiler.numerics.rounding import value_table
from fpcompiler.operand import Operand

__all__ = ["Portable"]


@dataclass(frozen=True)
class Portable:
    """Codes as bytes, and tables of their values.

    Codes of four bits stay packed, two a byte; the others take a byte each. Rows are filled up to
    whole blocks.
    """

    def weight(self, b: Builder, weight: StoredWeight) -> ir.Value:
        """Return the table's values times the scales of blocks."""
        spec, block = weight.operand.format, weight.operand.block
        n, width = len(weight.packed), block.block if block else weight.k
        codes = unpack(weight.packed, spec.storage_bits, weight.k)
        codes = torch.nn.functional.pad(codes, (0, -weight.k % width))
        # Six bits in three bytes would take operations on bits at each load, for a quarter less.
        stored = pack(codes, 4) if spec.storage_bits == 4 else codes
        constant = b.initializer(weight.codes_name, ir.tensor(stored.numpy()))
        values = _pairs(b, constant, spec) if spec.storage_bits == 4 else look_up(b, constant, spec)
        if block is None:
            row = b.op("Reshape", values, b.integers([n, -1])) if spec.storage_bits == 4 else values
            return _columns(b, row, weight.k, stored.shape[1] * 8 // spec.storage_bits)
        assert weight.block is not None
        scale = b.initializer(weight.block_name, ir.tensor(weight.block.numpy()))
        factors = scale if block.spec is None else look_up(b, scale, block.spec)
        split = b.op("Reshape", values, b.integers([n, -1, width]))
        product = b.op("Mul", split, b.op("Unsqueeze", factors, b.integers([-1])))
        return _columns(b, b.op("Reshape", product, b.integers([n, -1])), weight.k, codes.shape[1])

    def activation(
        self, b: Builder, values: Grouped, rounded: Rounded, operand: Operand
    ) -> ir.Value:
        """Return what was computed to find the scales."""
        return scaled_elements(b, values, rounded, operand)


def _pairs(b: Builder, codes: ir.Value, spec: FloatSpec) -> ir.Value:
    """Return the two values of each byte, ``[N, bytes, 2]``, the one of the low bits first."""
    values = np.asarray(value_table(spec))[:16]
    table = np.stack([np.tile(values, 16), np.repeat(values, 16)], axis=-1)
    return b.op("Gather", b.table(f"{spec.name}.pairs", table), b.cast(codes, ir.DataType.INT32))


def _columns(b: Builder, values: ir.Value, k: int, have: int) -> ir.Value:
    """Return the first ``k`` of the columns that there are."""
    if k == have:
        return values
    return b.op("Slice", values, b.integers([0]), b.integers([k]), b.integers([1]))
