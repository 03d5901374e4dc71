"""Types of the IR as Python values: tensor types, quantized types, dtypes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch_mlir import ir

from fpcompiler.errors import IRError
from fpcompiler.formats import FloatSpec, parse_format
from fpcompiler.operand import Operand

Shape = tuple[int | None, ...]
"""Sizes of the axes; None where the size is known only at run time."""

DTYPES: Final = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "si64": torch.int64,
    "si32": torch.int32,
    "si16": torch.int16,
    "si8": torch.int8,
    "ui8": torch.uint8,
    "i1": torch.bool,
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2": torch.float8_e5m2,
    "complex<f32>": torch.complex64,
    "complex<f64>": torch.complex128,
}
"""Torch dtype of each element type of a ``!torch.vtensor``."""

_BUILTIN_FORMATS: Final = frozenset(
    {"f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN", "f8E5M2", "f8E8M0FNU", "f8E3M4"}
)


@dataclass(frozen=True)
class TensorType:
    """A ``!torch.vtensor``: shape and the MLIR name of the element type."""

    shape: Shape
    element: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            IRError: If torch has no such dtype.
        """
        if self.element not in DTYPES:
            raise IRError(f"the element type {self.element} has no torch dtype")
        return DTYPES[self.element]

    def __str__(self) -> str:
        """Return the MLIR text."""
        sizes = ",".join("?" if size is None else str(size) for size in self.shape)
        return f"!torch.vtensor<[{sizes}],{self.element}>"

    def to_mlir(self) -> ir.Type:
        """Return the MLIR type, in the current context."""
        return ir.Type.parse(str(self))


@lru_cache(maxsize=4096)
def _parse_vtensor(text: str) -> TensorType | None:
    match = re.fullmatch(r"!torch\.vtensor<\[([^\]]*)\],(.*)>", text)
    if not match:
        return None
    sizes = tuple(None if s == "?" else int(s) for s in match[1].split(",") if s)
    return TensorType(sizes, match[2])


def tensor_type(value: ir.Value) -> TensorType | None:
    """Return the tensor type of a value, or None if it is no ranked ``!torch.vtensor``."""
    return _parse_vtensor(str(value.type))


@dataclass(frozen=True)
class QuantizedType:
    """A ``!fpq.quantized``: shape of the values and how they are represented."""

    shape: Shape
    operand: Operand

    def __str__(self) -> str:
        """Return the MLIR text."""
        return f'!fpq.quantized<{self.payload}, "{levels_text(self.operand)}">'

    @property
    def payload(self) -> str:
        """The MLIR text of the tensor of codes."""
        return ranked_text(self.shape, element_text(self.operand.format))

    def to_mlir(self) -> ir.Type:
        """Return the MLIR type, in the current context."""
        return ir.Type.parse(str(self))


def shape_text(shape: Shape) -> str:
    """Return a shape as error messages spell it."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def levels_text(operand: Operand) -> str:
    """Return the part of an operand's text that describes its scales."""
    return str(operand).partition("@")[2]


def element_text(spec: FloatSpec) -> str:
    """Return how a format is spelled as an element type: MLIR's own, or ``!fpq.float<"...">``."""
    return spec.name if spec.name in _BUILTIN_FORMATS else f'!fpq.float<"{spec.name}">'


def ranked_text(shape: Shape, element: str) -> str:
    """Return the text of a builtin ranked tensor type."""
    return f"tensor<{''.join(('?' if s is None else str(s)) + 'x' for s in shape)}{element}>"


def parse_element(text: str) -> FloatSpec:
    """Return the format that an element type spells.

    Raises:
        FormatError: If it is no format.
    """
    match = re.fullmatch(r'!fpq\.float<"(\w+)">', text)
    return parse_format(match[1] if match else text)


@lru_cache(maxsize=4096)
def parse_quantized(text: str) -> QuantizedType | None:
    """Return the quantized type that a text spells, or None if it spells another type.

    Raises:
        FormatError: If the format or the scale levels mean nothing.
    """
    match = re.fullmatch(r'!fpq\.quantized<tensor<((?:(?:\d+|\?)x)*)(.*)>, "([^"]*)">', text)
    if not match:
        return None
    sizes = tuple(None if s == "?" else int(s) for s in match[1].split("x") if s)
    spec = parse_element(match[2])
    return QuantizedType(
        sizes, Operand.parse("@".join([spec.name, match[3]][: 1 + bool(match[3])]))
    )


def quantized_type(value: ir.Value) -> QuantizedType | None:
    """Return the quantized type of a value, or None if it is another type.

    Raises:
        FormatError: If the format or the scale levels mean nothing.
    """
    return parse_quantized(str(value.type))
