"""The standard style: ONNX's own types of few bits, QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.interop.onnx.arithmetic import Grouped, Rounded
from fpcompiler.interop.onnx.builder import Builder
from fpcompiler.interop.onnx.styles import StoredWeight, scaled_elements
from fpcompiler.interop.onnx.types import E8M0_OPSET, Container, container, own_type
from fpcompiler.numerics import decode, encode, unpack
from fpcompiler.operand import Granularity, Operand

__all__ = ["Standard"]

_FLOAT: Final = int(ir.DataType.FLOAT)
_E8M0: Final = "f8E8M0FNU"


@dataclass(frozen=True)
class Standard:
    """Codes in the types of ONNX, with the operations that convert them.

    A weight without a type of its own is in the narrowest one that holds it. An activation without
    one is rounded by elementary operations, because a wider type would round it otherwise. So is
    one with a scale for each token whose length varies: that is a number in the file.

    Attributes:
        highest: The highest opset whose types are used.
    """

    highest: int

    def weight(self, b: Builder, weight: StoredWeight) -> ir.Value:
        """Return ``DequantizeLinear(codes, scales of blocks)``."""
        spec, block = weight.operand.format, weight.operand.block
        held = container(spec, self.highest, b.layer)
        codes = unpack(weight.packed, spec.storage_bits, weight.k)
        stored = b.initializer(weight.codes_name, _tensor(codes, spec, held))
        if block is None or weight.block is None:
            return b.op("DequantizeLinear", stored, b.number(held.factor))
        scale = self._scale(b, weight, held)
        own = {"output_dtype": _FLOAT} if scale.dtype == ir.DataType.FLOAT8E8M0 else {}
        return b.op("DequantizeLinear", stored, scale, axis=1, block_size=block.block, **own)

    def _scale(self, b: Builder, weight: StoredWeight, held: Container) -> ir.Value:
        """Return the scales of blocks as ONNX takes them: E8M0, or fp32."""
        assert weight.operand.block is not None
        assert weight.block is not None
        spec, name = weight.operand.block.spec, weight.block_name
        numbers = weight.block.numpy()
        if spec is None:
            return b.initializer(name, ir.tensor(numbers * np.float32(held.factor)))
        if held.factor != 1.0 or (spec.name == _E8M0 and self.highest < E8M0_OPSET):
            factors = decode(weight.block, spec).numpy() * np.float32(held.factor)
            return b.initializer(name, ir.tensor(factors))
        kind = ir.DataType.FLOAT8E8M0 if spec.name == _E8M0 else ir.DataType.FLOAT8E4M3FN
        stored = b.initializer(name, ir.Tensor(numbers.view(kind.numpy()), kind, name=name))
        if spec.name == _E8M0:
            return stored
        # E4M3 is no type of a scale in ONNX, so that the scale is itself dequantized.
        return b.op("DequantizeLinear", stored, b.number(1.0))

    def activation(
        self, b: Builder, values: Grouped, rounded: Rounded, operand: Operand
    ) -> ir.Value:
        """Return ``DequantizeLinear(QuantizeLinear(x, scales), scales of blocks)``."""
        own = own_type(operand.format)
        known = values.k is not None or not _by_token(operand)
        if own is None or own.opset > self.highest or not known:
            return scaled_elements(b, values, rounded, operand)
        to = {"output_dtype": int(own.dtype)}
        if operand.block is None:
            scale, blocks = self._whole(b, values, rounded, operand)
            codes = b.op("QuantizeLinear", values.x, scale, **blocks, **to)
            return b.op("DequantizeLinear", codes, b.number(1.0))
        assert rounded.block is not None
        block = b.op("Squeeze", rounded.block, b.integers([-1]))
        total = block if rounded.outer is None else b.op("Mul", block, rounded.outer)
        blocks = {"axis": values.rank - 1, "block_size": operand.block.block}
        codes = b.op("QuantizeLinear", values.x, total, **blocks, **to)
        return b.op("DequantizeLinear", codes, block, **blocks)

    def _whole(
        self, b: Builder, values: Grouped, rounded: Rounded, operand: Operand
    ) -> tuple[ir.Value, dict[str, Any]]:
        """Return the scale of the tensor, or of tokens as of blocks that are as long as a row."""
        if operand.outer is None or rounded.outer is None:
            return b.number(1.0), {}
        if operand.outer.granularity is Granularity.TENSOR:
            return b.op("Reshape", rounded.outer, b.integers([])), {}
        return rounded.outer, {"axis": values.rank - 1, "block_size": values.k}


def _by_token(operand: Operand) -> bool:
    """Return whether the scales are those of tokens alone."""
    outer = operand.outer
    return (
        outer is not None and operand.block is None and outer.granularity is not Granularity.TENSOR
    )


def _tensor(codes: Tensor, spec: FloatSpec, held: Container) -> ir.TensorProtocol:
    """Return codes ``[N, K]``, one a byte, in a type of ONNX."""
    own, kind = own_type(spec), held.dtype
    if own is not None and own.dtype == kind:
        return ir.Tensor(codes.numpy().view(kind.numpy()), kind)
    values = decode(codes, spec)
    if kind in _WIDER:
        recoded = encode(values, FORMATS[_WIDER[kind]])
        return ir.Tensor(recoded.numpy().view(kind.numpy()), kind)
    return ir.Tensor((values / held.factor).to(torch.int16).numpy().astype(kind.numpy()), kind)


_WIDER: Final = {ir.DataType.FLOAT8E4M3FN: "f8E4M3FN", ir.DataType.FLOAT8E5M2: "f8E5M2"}
"""Types that may hold another format, and the format that they are."""
