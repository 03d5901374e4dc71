"""The opset of a file: the lowest that has all of its types."""

from __future__ import annotations

from typing import Final

import onnx
import onnx_ir as ir
from onnxscript import version_converter

from fpcompiler.interop.onnx.trace import BASE_OPSET
from fpcompiler.interop.onnx.types import BLOCK_OPSET, E8M0_OPSET, opset_of

__all__ = ["needed_opset", "set_opset"]

_CONVERTED: Final = 25
"""The highest that onnxscript converts to. Opsets 26 to 28 add only types to what torch's
exporter writes: a model of opset 25 is one of theirs."""

_CONVERSIONS: Final = ("QuantizeLinear", "DequantizeLinear")


def needed_opset(model: ir.Model) -> int:
    """Return the lowest opset that has what the conversions of a model ask for."""
    return max((_needed(node) for node in model.graph), default=BASE_OPSET)


def _needed(node: ir.Node) -> int:
    if node.op_type not in _CONVERSIONS:
        return BASE_OPSET
    kinds = [value.dtype for value in node.inputs[:2] if value is not None]
    kinds.append(ir.DataType(node.attributes.get_int("output_dtype", int(ir.DataType.FLOAT))))
    needed = [BLOCK_OPSET, *(opset_of(kind) for kind in kinds if kind is not None)]
    if ir.DataType.FLOAT8E8M0 in kinds:
        needed.append(E8M0_OPSET)
    return max(needed)


def set_opset(model: ir.Model, opset: int) -> None:
    """Bring a model from opset 18 to another one, in place."""
    if opset > BASE_OPSET:
        version_converter.convert_version(model, target_version=min(opset, _CONVERTED))
    model.graph.opset_imports[""] = opset
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
