"""Outputs that a GEMM quantizes for the next layer: which, and the C++ that says how."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Final

from fpcompiler.codegen.cuda.quantize import HEADERS, structure_text
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.fused import ACTIVATIONS

__all__ = [
    "QuantizedOutput",
    "CPP_ELEMENT",
    "why_not_quantized",
    "why_not_on",
    "device_code",
]

CPP_ELEMENT: Final = {
    "f4E2M1FN": "cutlass::float_e2m1_t",
    "f6E2M3FN": "cutlass::float_e2m3_t",
    "f6E3M2FN": "cutlass::float_e3m2_t",
    "f8E4M3FN": "cutlass::float_e4m3_t",
    "f8E5M2": "cutlass::float_e5m2_t",
}
"""The C++ types of the formats that CUTLASS rounds to and the copy engine stores packed."""
_SCALE: Final = "f8E8M0FNU"
_BLOCK: Final = 32
_BLACKWELL: Final = 100
_SIX: Final = 6
_LEVEL: Final = 2
"""Blackwell has conversions to all of them."""


@dataclass(frozen=True)
class QuantizedOutput:
    """What becomes of an output that is read by a quantizer alone.

    Attributes:
        operand: The text of the operand that the next layer reads.
        producer: The activation in between, one of ``fused.ACTIVATIONS``; empty for none.
    """

    operand: str
    producer: str = ""

    def __post_init__(self) -> None:
        """Check that there are such kernels.

        Raises:
            ValueError: If there are none.
        """
        reason = why_not_quantized(Operand.parse(self.operand), self.producer)
        if reason:
            raise ValueError(reason)

    @property
    def element(self) -> str:
        """The element type of D."""
        return Operand.parse(self.operand).format.name

    @property
    def bits(self) -> int:
        """Of an element."""
        return FORMATS[self.element].storage_bits

    def __str__(self) -> str:
        """Return a part of names, different for different outputs."""
        operand = Operand.parse(self.operand)
        rounding = operand.block.rounding.value if operand.block and operand.block.rounding else ""
        parts = ["to", FORMATS[self.element].short.lower(), rounding, self.producer]
        return "_".join(part for part in parts if part)


def why_not_quantized(operand: Operand, producer: str) -> str:
    """Return in words why no GEMM quantizes its output like this; nothing if there are some."""
    block = operand.block
    if operand.outer is not None:
        return f"the scale {operand.outer} of {operand} is known only when the whole output is"
    if block is None or block.format != _SCALE or block.block != _BLOCK:
        return f"{operand} has no powers of two as scales of blocks of {_BLOCK} alone"
    if operand.format.name not in CPP_ELEMENT:
        return f"no copy engine stores {operand.format}"
    if producer and producer not in ACTIVATIONS:
        return f"{producer} reads more than the output"
    return ""


def why_not_on(collectives: int, quantized: QuantizedOutput) -> str:
    """Return in words why no kernel for a generation of GPUs does it; nothing if one does.

    Args:
        collectives: CUTLASS's number of the generation: 90, 100 or 120.
        quantized: What becomes of the output.
    """
    if collectives < _BLACKWELL:
        return "Hopper has no block scales"
    if collectives == _BLACKWELL and quantized.bits == _SIX:
        # Lines of 128 columns are one thread's, with two vectors over N: 744 bytes of stack
        # (measured, nvcc 13.0).
        return "codes of six bits are stored in lines of 128, for which threads lack registers"
    return ""


def device_code(quantized: QuantizedOutput, output: str) -> str:
    """Return the functions of quantizers and the structure of the problem, for an epilogue.

    Args:
        quantized: What becomes of the output.
        output: The type that it is rounded to before, as in ``QuantizeProblem``.
    """
    root = resources.files("fpcompiler.codegen.cuda")
    names = (*(name for name in HEADERS if name != "kernels.h"), "blocks.h")
    headers = [(root / name).read_text(encoding="utf-8") for name in names]
    problem = structure_text(0, problem_of(quantized, output), _LEVEL)
    beginning = f"#define FPC_CONVERTS {_LEVEL}\n#define FPC_FOLLOWS 0"
    return "\n".join([beginning, *headers, "namespace fpc {", problem, "}  // namespace fpc"])


def problem_of(quantized: QuantizedOutput, output: str) -> QuantizeProblem:
    """Return what a kernel computes that quantizes the stored output.

    Raises:
        FormatError: If there can be none.
    """
    operand = Operand.parse(quantized.operand)
    return QuantizeProblem(operand, output, quantized.producer, swizzled=True)
