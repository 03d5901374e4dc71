"""The types of ONNX that hold our formats, and the opset that has each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from fpcompiler.errors import ExportError, describe_layer
from fpcompiler.formats import FORMATS, FloatSpec

__all__ = ["BLOCK_OPSET", "E8M0_OPSET", "Container", "OwnType", "container", "own_type"]

BLOCK_OPSET: Final = 21
"""The first in which QuantizeLinear and DequantizeLinear have scales for blocks."""
E8M0_OPSET: Final = 24
"""The first in which such scales may be E8M0."""


@dataclass(frozen=True)
class OwnType:
    """A type of ONNX that is a format of ours, code for code.

    Attributes:
        dtype: The type.
        opset: The first opset whose QuantizeLinear and DequantizeLinear take it.
    """

    dtype: ir.DataType
    opset: int


@dataclass(frozen=True)
class Container:
    """How the elements of a format are stored.

    Attributes:
        dtype: A type of ONNX.
        opset: The first opset whose DequantizeLinear takes it.
        factor: A stored number times this is the element: a power of two, 1 unless the type is
            one of integers.
    """

    dtype: ir.DataType
    opset: int
    factor: float = 1.0


_OWN: Final = {
    "f4E2M1FN": OwnType(ir.DataType.FLOAT4E2M1, 23),
    "f6E2M3FN": OwnType(ir.DataType.FLOAT6E2M3, 28),
    "f6E3M2FN": OwnType(ir.DataType.FLOAT6E3M2, 28),
    "f8E4M3FN": OwnType(ir.DataType.FLOAT8E4M3FN, BLOCK_OPSET),
    "f8E5M2": OwnType(ir.DataType.FLOAT8E5M2, BLOCK_OPSET),
}
_INTEGERS: Final = (
    (ir.DataType.INT4, 7),
    (ir.DataType.INT8, 127),
    (ir.DataType.INT16, 32767),
)
_WIDER: Final = ("f8E4M3FN", "f8E5M2")
"""Formats with a type of their own that may hold another one, from opset 21 on."""


def own_type(spec: FloatSpec) -> OwnType | None:
    """Return the type of ONNX that is a format, or None if there is none."""
    return _OWN.get(spec.name)


def container(spec: FloatSpec, highest: int, layer: str) -> Container:
    """Return the narrowest type of ONNX that holds every number of a format.

    That is its own type; or a wider format; or integers and a power of two, if they are shorter.

    Args:
        spec: The format.
        highest: The highest opset that may be used.
        layer: Named in errors.

    Raises:
        ExportError: If there is none.
    """
    own = _OWN.get(spec.name)
    if own is not None and own.opset <= highest:
        return Container(own.dtype, own.opset)
    steps = spec.max / spec.smallest
    found = [Container(_OWN[name].dtype, BLOCK_OPSET) for name in _WIDER if _holds(name, spec)]
    found += [
        Container(dtype, BLOCK_OPSET, spec.smallest)
        for dtype, largest in _INTEGERS
        if steps <= largest
    ]
    fitting = [item for item in found if item.opset <= highest]
    if not fitting:
        raise ExportError(
            f"{describe_layer(layer)}: no type of ONNX up to opset {highest} holds every number of "
            f"{spec}. Export to onnx-portable, or compile the layer with another format."
        )
    return min(fitting, key=lambda item: item.dtype.itemsize)


def _holds(name: str, spec: FloatSpec) -> bool:
    values = {*FORMATS[name].values}
    numbers = {spec.value(code) for code in range(spec.max_code + 1)}
    return numbers <= values


def opset_of(dtype: ir.DataType) -> int:
    """Return the first opset whose conversions take a type."""
    return max((own.opset for own in _OWN.values() if own.dtype == dtype), default=BLOCK_OPSET)
