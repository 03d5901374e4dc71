"""Targets, one row each: what a machine can multiply, and whether this version has kernels for it.

A row states facts about the hardware whether or not there are kernels: which pairs of element
formats an instruction takes, with which scales, at which alignment and rate. Sources: the PTX ISA
and CUTLASS's table of Blackwell GEMMs. :attr:`Target.status` says what has been done with it here.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fpcompiler.errors import TargetError
from fpcompiler.formats import FORMATS
from fpcompiler.operand import BLOCK_SIZES, SCALE_FORMATS, Operand

__all__ = ["Target", "GemmKind", "Status", "TARGETS", "lookup"]


class Status(enum.Enum):
    """What has been done with a target's kernels."""

    EXECUTED = "executed"
    """They run, and their results are checked against the reference."""
    COMPILED_ONLY = "compiled-only"
    """They compile and are checked statically, but have not run on the hardware."""
    UNAVAILABLE = "no kernels yet in this version"
    """There are none; only the facts about the hardware are here."""


@dataclass(frozen=True)
class GemmKind:
    """One way in which a target multiplies two operands.

    Attributes:
        name: What the instruction set calls it.
        weights: Element formats of weights that it takes, itself or in a wider container that
            holds them exactly.
        activations: The same for activations; empty if these have 16 bits or more.
        blocks: Block levels that each operand may have, such as ``block32:f8E8M0FNU``; ``""``
            stands for none. A real scale of the tensor, row or token is always possible: it
            multiplies the finished sum.
        k_alignment: K is padded to a multiple of this many values.
        instruction: The instruction.
        rate: Its rate, in words.
    """

    name: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    blocks: tuple[str, ...]
    k_alignment: int
    instruction: str
    rate: str

    def takes(self, weight: Operand, activation: Operand | None) -> bool:
        """Return whether the instruction multiplies these operands exactly."""
        if activation is None:
            return not self.activations and self._takes(weight, self.weights)
        return self._takes(weight, self.weights) and self._takes(activation, self.activations)

    def _takes(self, operand: Operand, formats: tuple[str, ...]) -> bool:
        level = operand.block
        # How the scale was rounded makes no difference to the instruction, so it is left out.
        block = f"block{level.block}:{level.format}" if level else ""
        return operand.format.name in formats and block in self.blocks


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    Attributes:
        name: What the user writes.
        machine: What it is.
        status: What has been done with its kernels in this version.
        kinds: The ways in which it multiplies, best first.
        note: What a user should know.
        beside: Whether its kernels stand beside a plan that is for another target.
    """

    name: str
    machine: str
    status: Status
    kinds: tuple[GemmKind, ...]
    note: str = ""
    beside: bool = False

    @property
    def available(self) -> bool:
        """Whether a plan can be for the target."""
        return self.status is not Status.UNAVAILABLE and not self.beside

    def kind_for(self, weight: Operand, activation: Operand | None) -> GemmKind | None:
        """Return the best way in which the hardware multiplies two operands, or None."""
        return next((kind for kind in self.kinds if kind.takes(weight, activation)), None)

    def supports(self, weight: Operand, activation: Operand | None) -> str | None:
        """Return None if a plan for the target can run such a layer, or else the reason.

        Args:
            weight: The weights' operand.
            activation: The activations' operand; None for 16 bits or more.
        """
        if self.beside:
            return f"{self.name}: its kernels stand beside a plan for the target cpu or reference"
        if not self.available:
            return f"{self.name}: {self.status.value}; use the target reference"
        if self.kind_for(weight, activation) is None:
            kinds = ", ".join(kind.name for kind in self.kinds)
            return f"{self.name}: none of {kinds} takes w={weight},a={activation or 'none'}"
        return None


_ALL: Final = tuple(name for name, spec in FORMATS.items() if spec.signed)
_E2M1: Final = ("f4E2M1FN",)
# Times a power of two, every value of these is one of E4M3.
_IN_E4M3: Final = (
    "f4E2M1FN", "f4E1M2FN", "f4E3M0FN", "f6E2M3FN", "f6E3M2FN", "f6E4M1FN", "f8E4M3FN",
)  # fmt: skip
# E5M2 holds E5M0 too. The other formats of LLM-FP4 (E1M4, E2M5, E1M6) have too many mantissa bits.
_IN_FP8: Final = (*_IN_E4M3, "f6E5M0FN", "f8E5M2")

# Times a power of two, every value of these is an integer of eight bits.
_IN_INT8: Final = (
    "f4E2M1FN", "f4E1M2FN", "f4E3M0FN", "f6E2M3FN", "f6E1M4FN", "f8E1M6FN",
)  # fmt: skip

_INT8_CODES: Final = ("f4E2M1FN", "f4E1M2FN")
"""Of four bits, integers up to 63."""

_NONE: Final = ("",)
_MX: Final = tuple(f"block{size}:f8E8M0FNU" for size in BLOCK_SIZES)
_MX32: Final = ("block32:f8E8M0FNU",)
_NV16: Final = ("block16:f8E4M3FN",)
_ANY: Final = (*_NONE, *(f"block{n}:{scale}" for n in BLOCK_SIZES for scale in SCALE_FORMATS))

_BF16_RATE: Final = "that of bf16"


def _bf16(instruction: str, alignment: int) -> tuple[GemmKind, ...]:
    """Return the kinds that decode to bf16: with 16-bit activations, and with quantized ones.

    The eight significant bits of bf16 hold every format times a power of two, and E2M1 or E4M3
    times a scale of E4M3.
    """
    blocks = (*_NONE, *_MX)
    return (
        GemmKind("bf16", _ALL, (), blocks, alignment, instruction, _BF16_RATE),
        GemmKind("bf16", _ALL, _ALL, blocks, alignment, instruction, _BF16_RATE),
        GemmKind("bf16", _E2M1, (), _NV16, alignment, instruction, _BF16_RATE),
        GemmKind("bf16", _E2M1, _IN_E4M3, _NV16, alignment, instruction, _BF16_RATE),
    )


_ROWS: Final = (
    Target(
        "reference",
        "any device of torch",
        Status.EXECUTED,
        (
            GemmKind("decode", _ALL, (), _ANY, 1, "torch.matmul", "below that of fp32"),
            GemmKind("decode", _ALL, _ALL, _ANY, 1, "torch.matmul", "below that of fp32"),
        ),
        "Defines the results. Weights stay packed; a few rows are decoded at a time.",
    ),
    Target(
        "cpu",
        "x86-64; fastest with AVX-512 VNNI. ARM64 under emulation only",
        Status.EXECUTED,
        (
            GemmKind("int8", _IN_INT8, _IN_INT8, _ANY, 8, "vpdpbusd or sdot", "4x that of fp32"),
            GemmKind("bf16", _ALL, (), _ANY, 8, "vdpbf16ps or FMA", _BF16_RATE),
            GemmKind("bf16", _ALL, _ALL, _ANY, 8, "vdpbf16ps or FMA", _BF16_RATE),
        ),
        "Codes are decoded in registers; integer sums are exact.",
    ),
    Target(
        "sm_90a",
        "NVIDIA H100, H200",
        Status.EXECUTED,
        (
            GemmKind("int8", _INT8_CODES, _IN_INT8, _NONE, 128, "wgmma (u8, s8)", "that of FP8"),
            GemmKind("fp8", _IN_FP8, _IN_FP8, _NONE, 16, "wgmma (e4m3, e5m2)", "that of FP8"),
            *_bf16("wgmma (bf16)", 8),
        ),
        "No instruction for FP4 or FP6: weights stay packed until they are in registers. Row by "
        "token scales are multiplied as int8, whose sums are exact; blocks of 16 and 32 and 16-bit "
        "activations as bf16. The sums of fp8 keep 13 fraction bits, those of bf16 25.",
        beside=True,
    ),
    Target(
        "sm_100a",
        "NVIDIA B200",
        Status.COMPILED_ONLY,
        (
            GemmKind("mxf4", _E2M1, _E2M1, _MX32, 32, "tcgen05.mma kind::mxf4", "4x H100's FP8"),
            GemmKind(
                "nvf4", _E2M1, _E2M1, _NV16, 32, "tcgen05.mma kind::mxf4nvf4", "4x H100's FP8"
            ),
            GemmKind(
                "mxf8f6f4", _IN_FP8, _IN_FP8, _MX32, 128, "tcgen05.mma kind::mxf8f6f4",
                "2x H100's FP8",
            ),
            GemmKind(
                "f8f6f4", _IN_FP8, _IN_FP8, _NONE, 128, "tcgen05.mma kind::f8f6f4", "2x H100's FP8"
            ),
            *_bf16("tcgen05.mma kind::f16", 8),
        ),
        "FP4 by FP6 or FP8 runs at the rate of FP8; only FP4 by FP4 runs at that of FP4. There are "
        "no kernels for bf16 yet.",
        beside=True,
    ),
    Target(
        "sm_120a",
        "NVIDIA RTX 50, RTX PRO 6000",
        Status.COMPILED_ONLY,
        (
            GemmKind("mxf4", _E2M1, _E2M1, _MX32, 32, "mma.sync m16n8k64 kind::mxf4", "2x its FP8"),
            GemmKind(
                "nvf4", _E2M1, _E2M1, _NV16, 32, "mma.sync m16n8k64 kind::mxf4nvf4", "2x its FP8"
            ),
            GemmKind(
                "mxf8f6f4", _IN_FP8, _IN_FP8, _MX32, 128, "mma.sync m16n8k32 kind::mxf8f6f4",
                "that of FP8",
            ),
            GemmKind(
                "f8f6f4", _IN_FP8, _IN_FP8, _NONE, 128, "mma.sync m16n8k32 kind::f8f6f4",
                "that of FP8",
            ),
            *_bf16("mma.sync (bf16)", 8),
        ),
        "FP4 by FP6 or FP8 runs at the rate of FP8; only FP4 by FP4 runs at that of FP4. There are "
        "no kernels for bf16 yet.",
        beside=True,
    ),
)  # fmt: skip

TARGETS: Final[Mapping[str, Target]] = MappingProxyType({row.name: row for row in _ROWS})
"""Every target by name."""


def lookup(name: str) -> Target:
    """Return a target by name.

    Raises:
        TargetError: If there is no such target; the message lists them.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, list(TARGETS), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise TargetError(f"There is no target {name!r}. {hint}Targets: {', '.join(TARGETS)}.")
