"""What one generated GEMM computes: ``GemmProblem``.

With activations A [M, K] and weights B [N, K], both of few bits and with K contiguous::

    acc[m, n] = sum over k of A[m, k] * scale_a[m, k / block] * B[n, k] * scale_b[n, k / block]
    D[m, n]   = activation(alpha * token[m] * row[n] * acc[m, n] + bias[n]) + residual[m, n]

Everything behind ``acc`` is fp32 and rounded once, to D. M, N and K are arguments of the kernel.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from fpcompiler.artifact.kernels import DECODE_ROWS
from fpcompiler.codegen.arch import ARCHS, Arch
from fpcompiler.numerics.shift_lowering import Container

__all__ = [
    "GemmProblem", "Epilogue", "Activation", "BlockScale", "OutputType", "Rows", "K_PADDING",
]  # fmt: skip

K_PADDING: Final = 128
"""K is padded to a multiple of this with zeros, whatever the formats.

The TMA formats that unpack FP4 and FP6 need it, and so do whole atoms of block scales. Kernels for
two FP4 operands need 32 only and FP8 16; one rule lets all kernels share the packed weights.
"""

_OUTPUT_BYTES: Final = 16  # TMA stores D in runs of 16 bytes.


class BlockScale(enum.Enum):
    """Scales along K that the instruction itself applies."""

    NONE = "none"
    MX32 = "block32:f8E8M0FNU"
    """One power of two for 32 values (OCP MX)."""
    NV16 = "block16:f8E4M3FN"
    """One E4M3 number for 16 values (NVFP4)."""

    @property
    def block(self) -> int:
        """Values per scale; 0 for none."""
        return {BlockScale.NONE: 0, BlockScale.MX32: 32, BlockScale.NV16: 16}[self]


class Rows(enum.Enum):
    """The range of M that a kernel is made for. It computes every M; only its speed differs."""

    DECODE = "decode"
    """At most ``DECODE_ROWS``, one tile or two: reading the weights bounds the speed."""
    PREFILL = "prefill"
    """More rows: multiplying bounds the speed."""

    @classmethod
    def of(cls, m: int) -> Rows:
        """Return the range that holds M."""
        return cls.DECODE if m <= DECODE_ROWS else cls.PREFILL

    @property
    def typical(self) -> int:
        """An M to compare kernels at."""
        return 32 if self is Rows.DECODE else 2048


class Activation(enum.Enum):
    """Functions that the epilogue can apply, by the names of torch."""

    NONE = "none"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class OutputType(enum.Enum):
    """Element types of D and of the residual. Scales and the bias are fp32."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"

    @property
    def bytes(self) -> int:
        """Bytes per element."""
        return 4 if self is OutputType.F32 else 2


@dataclass(frozen=True)
class Epilogue:
    """What happens to the sums before they are stored.

    Attributes:
        alpha: Whether they are multiplied by a number: scales of whole tensors, and the powers of
            two that containers left over.
        token_scale: Whether there is a scale for each row of A.
        row_scale: Whether there is a scale for each row of B.
        bias: Whether there is a bias for each row of B.
        activation: The function applied after the bias.
        residual: Whether a tensor like D is added at the end.
    """

    alpha: bool = False
    token_scale: bool = False
    row_scale: bool = False
    bias: bool = False
    activation: Activation = Activation.NONE
    residual: bool = False


@dataclass(frozen=True)
class GemmProblem:
    """One GEMM of a model on one architecture, in formats that its instruction reads.

    Made by :func:`fpcompiler.codegen.legalize.legalize`.

    Attributes:
        arch: The architecture's name, such as ``sm_100a``.
        kind: The kind of instruction, by its name in the targets.
        weight: The element format of B.
        activation: The element format of A.
        scale: The block scales of both.
        n: Output channels.
        k: Input channels.
        rows: The range of M.
        epilogue: What happens to the sums.
        output: The element type of D and of the residual.
    """

    arch: str
    kind: str
    weight: Container
    activation: Container
    scale: BlockScale
    n: int
    k: int
    rows: Rows
    epilogue: Epilogue = Epilogue()
    output: OutputType = OutputType.BF16

    @property
    def machine(self) -> Arch:
        """The architecture."""
        return ARCHS[self.arch]

    @property
    def n_padding(self) -> int:
        """N is padded to a multiple of this: rows of D are whole runs of 16 bytes."""
        return _OUTPUT_BYTES // self.output.bytes

    @property
    def padded_n(self) -> int:
        """N as the kernel sees it: rows of B, scales and bias are padded with zeros up to it."""
        return -(-self.n // self.n_padding) * self.n_padding

    @property
    def padded_k(self) -> int:
        """K as the kernel sees it: A and B are padded with zeros up to it."""
        return -(-self.k // K_PADDING) * K_PADDING

    @property
    def container_exponent(self) -> int:
        """The power of two that containers put into the sums; alpha must hold its inverse."""
        return self.weight.shift + self.activation.shift
