"""What a kernel that quantizes activations computes, and in which form it leaves the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fpcompiler.errors import FormatError
from fpcompiler.numerics.hadamard import HADAMARD_BLOCKS
from fpcompiler.numerics.packing import packed_bytes
from fpcompiler.operand import Granularity, Operand
from fpcompiler.runtime.cuda.stored import BF16, I8, code_bits, why_not
from fpcompiler.runtime.fused import PRODUCERS, SLOTS

TYPES: Final = ("f32", "f16", "bf16")
"""Types of tensors that kernels read, in the order of ``FpcInput``."""


@dataclass(frozen=True)
class QuantizeProblem:
    """A quantizer of rows, fused with what computes its values.

    The codes and scales are those of :func:`fpcompiler.numerics.quantize_packed`. Sizes, strides
    and ``eps`` are arguments of the kernel.

    Attributes:
        operand: Element format and scale levels. A scale per row is one per token.
        input: The type of the tensor that is read, one of :data:`TYPES`.
        producer: A name in :data:`fpcompiler.runtime.fused.PRODUCERS`, or empty: the values are
            those of the tensor.
        beside: The types of the producer's weight, bias, scale and shift; empty where not given.
        stored: The form of the values, a name in :data:`fpcompiler.runtime.cuda.stored.STORED`;
            empty for packed codes.
        swizzled: Whether scales of blocks are written in atoms of 128 rows by 4 scales, as
            tensor cores of Blackwell read them, and not row by row.
        given: Whether the scale of the tensor is an argument, not computed.
        hadamard: Values in a block that the Hadamard transform mixes before; 0 for none.
    """

    operand: Operand
    input: str = "bf16"
    producer: str = ""
    beside: tuple[str, str, str, str] = ("", "", "", "")
    stored: str = ""
    swizzled: bool = False
    given: bool = False
    hadamard: int = 0

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            FormatError: If there can be no such kernel.
        """
        problem = self._problem()
        if problem:
            raise FormatError(f"no kernel can quantize to {self.operand} like this: {problem}.")

    @property
    def code_bits(self) -> int:
        """Bits that a value takes in memory: 4, 6, 8 or 16."""
        return code_bits(self.operand.format, self.stored)

    @property
    def computes_tensor_scale(self) -> bool:
        """Whether the largest magnitude of the whole tensor is found first."""
        outer = self.operand.outer
        return outer is not None and outer.granularity is Granularity.TENSOR and not self.given

    def row_bytes(self, k: int) -> int:
        """Return the least bytes of a row of ``k`` values."""
        return 2 * k if self.stored == BF16 else packed_bytes(k, self.code_bits)

    def outer_count(self, m: int) -> int:
        """Return how many words of 32 bits hold the real scales of ``m`` rows, and their sums."""
        outer = self.operand.outer
        if outer is None:
            return 0
        return 1 if outer.granularity is Granularity.TENSOR else 2 * m if self.stored == I8 else m

    def scale_count(self, k: int) -> int:
        """Return how many scales of blocks are written for a row of ``k`` values."""
        block = self.operand.block
        return -(-k // block.block) if block and self.stored != BF16 else 0

    def _problem(self) -> str:
        operand, block = self.operand, self.operand.block
        if self.input not in TYPES or not set(self.beside) <= {"", *TYPES}:
            return f"tensors are {', '.join(TYPES)}"
        if not operand.format.zero:
            return f"{operand.format} has no zero"
        unfit = why_not(operand, self.stored)
        if unfit:
            return unfit
        if self.swizzled and (block is None or block.is_real or self.stored == BF16):
            return "only scales of blocks that are one byte can be swizzled"
        outer = operand.outer
        if self.given and (outer is None or outer.granularity is not Granularity.TENSOR):
            return "only the scale of a tensor can be given"
        if self.hadamard and self.hadamard not in HADAMARD_BLOCKS:
            return f"Hadamard blocks are {', '.join(map(str, HADAMARD_BLOCKS))}"
        return self._producer_problem()

    def _producer_problem(self) -> str:
        named = frozenset(name for name, type in zip(SLOTS, self.beside, strict=True) if type)
        if self.producer and self.producer not in PRODUCERS:
            return f"there is no producer {self.producer!r}"
        if self.producer:
            return PRODUCERS[self.producer].problem(named)
        return "without a producer nothing but x is read" if named else ""

    def __str__(self) -> str:
        """Return a text that differs where problems do."""
        parts = [f"{self.input}->{self.operand}"]
        if self.stored:
            parts.append(f"as {self.stored}")
        parts += [name for name in ("swizzled", "given") if getattr(self, name)]
        if self.hadamard:
            parts.append(f"hadamard{self.hadamard}")
        if self.producer:
            types = zip(SLOTS, self.beside, strict=True)
            given = ",".join(f"{name}:{type}" for name, type in types if type)
            parts.append(f"{self.producer}({given})")
        return " ".join(parts)
