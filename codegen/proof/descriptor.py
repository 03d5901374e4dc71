"""Level 3: the instruction descriptors of ``tcgen05.mma``, found in PTX.

The machine code of ``tcgen05.mma`` does not say which formats it reads: they are in a descriptor of
32 bits that the program computes, most of it from constants. What is known of those bits follows
from a few instructions of PTX; the rest, which of four scales of a word is meant, is known at run
time only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["MmaDescriptor", "mma_descriptors", "MMA_FORMATS"]

MMA_FORMATS: Final = MappingProxyType(
    {0: "f8E4M3FN", 1: "f8E5M2", 3: "f6E2M3FN", 4: "f6E3M2FN", 5: "f4E2M1FN"}
)
"""Codes of formats in descriptors of ``f8f6f4`` and ``mxf8f6f4`` (PTX ISA)."""

_FP4_FORMATS: Final = MappingProxyType({1: "f4E2M1FN"})
_SUMS: Final = MappingProxyType({0: "f16", 1: "f32", 2: "s32"})
_WORD: Final = (1 << 32) - 1
_DEPTH: Final = 16

_MMA: Final = re.compile(
    r"(tcgen05\.mma\.[\w:.]*kind::\w+[\w:.]*)\s+\[[^\]]+\],\s*[^,]+,\s*[^,]+,\s*(%r\d+)"
)
_DEFINITION: Final = re.compile(
    r"^\s*(?P<guard>@!?%p\d+\s+)?(?P<name>[a-z][\w.:]*)\s+(?P<out>%\w+),\s*(?P<rest>[^;]*);",
    re.MULTILINE,
)
_PACKED: Final = re.compile(r"^\{(%\w+), (%\w+)\}$")


@dataclass(frozen=True)
class MmaDescriptor:
    """The descriptor of one instruction.

    Attributes:
        instruction: Its name in PTX, with kind and scales.
        bits: The descriptor; bits that are not known are 0.
        known: Ones where a bit is known.
    """

    instruction: str
    bits: int
    known: int

    @property
    def kind(self) -> str:
        """The kind of instruction, such as ``mxf8f6f4``."""
        return self.instruction.partition("kind::")[2].partition(".")[0]

    @property
    def has_scales(self) -> bool:
        """Whether it applies block scales."""
        return ".block_scale" in self.instruction

    @property
    def block(self) -> int:
        """Values per scale; 0 for none."""
        if not self.has_scales:
            return 0
        small = ".block16" in self.instruction or "scale_vec::4X" in self.instruction
        return 16 if small else 32

    @property
    def sms(self) -> int:
        """SMs that multiply together."""
        return 2 if "cta_group::2" in self.instruction else 1

    @property
    def a(self) -> str:
        """The element format of A; empty if it is not known or there is none."""
        return self._format(7)

    @property
    def b(self) -> str:
        """The element format of B, likewise."""
        return self._format(10)

    @property
    def m(self) -> int | None:
        """Rows of A that it multiplies, or None if they are not known."""
        return self._scaled(24, 5, 16)

    @property
    def n(self) -> int | None:
        """Rows of B, likewise."""
        return self._scaled(17, 6, 8)

    @property
    def scale(self) -> str:
        """The format of block scales; empty if it is not known, or there are none."""
        names = {0: "f8E4M3FN", 1: "f8E8M0FNU"}
        return names.get(self._field(23, 1) or 0, "") if self._is_known(23) else ""

    @property
    def sums(self) -> str:
        """The type of the sums where the descriptor says it; with scales it is fp32."""
        return "f32" if self.has_scales else _SUMS.get(self._field(4, 2) or 0, "")

    @property
    def plain(self) -> bool:
        """Whether both operands have K contiguous, are not negated, and dense."""
        return all(self._field(bit, 1) == 0 for bit in (2, 13, 14, 15, 16))

    def _format(self, start: int) -> str:
        table = MMA_FORMATS if "f8f6f4" in self.kind else _FP4_FORMATS
        code = self._field(start, 3)
        return "" if code is None else table.get(code, "")

    def _scaled(self, start: int, width: int, unit: int) -> int | None:
        value = self._field(start, width)
        return None if value is None else value * unit

    def _is_known(self, bit: int) -> bool:
        return self.has_scales and self._field(bit, 1) is not None

    def _field(self, start: int, width: int) -> int | None:
        mask = ((1 << width) - 1) << start
        return (self.bits & mask) >> start if self.known & mask == mask else None


def mma_descriptors(ptx: str) -> tuple[MmaDescriptor, ...]:
    """Return the descriptor of every ``tcgen05.mma`` in a text of PTX, in order."""
    definitions: dict[str, list[tuple[str, str]]] = {}
    for match in _DEFINITION.finditer(ptx):
        # What depends on a predicate may keep its earlier value: as if it had two definitions.
        names = ["guarded"] if match["guard"] else []
        for name in (*names, match["name"]):
            definitions.setdefault(match["out"], []).append((name, match["rest"]))
    return tuple(
        MmaDescriptor(match[1], *_known_bits(match[2], definitions)) for match in _MMA.finditer(ptx)
    )


def _known_bits(
    operand: str, definitions: dict[str, list[tuple[str, str]]], depth: int = 0
) -> tuple[int, int]:
    """Return what is known of a register or constant: its bits, and which of them are known."""
    if re.fullmatch(r"-?\d+", operand):
        return int(operand) & _WORD, _WORD
    found = definitions.get(operand, [])
    if len(found) != 1 or depth > _DEPTH:
        return 0, 0
    name, rest = found[0]
    packed = _PACKED.match(rest)
    sources = packed.groups() if packed else [part.strip() for part in rest.split(",")]
    combine = _join if packed else _OPERATIONS.get(name.partition(".")[0])
    if combine is None:
        return 0, 0
    return combine(*(_known_bits(source, definitions, depth + 1) for source in sources))


_Bits = tuple[int, int]


def _move(x: _Bits) -> _Bits:
    return x


def _join(low: _Bits, high: _Bits) -> _Bits:
    half = _WORD >> 16
    bits, known = (x & half | (y & half) << 16 for x, y in zip(low, high, strict=True))
    return bits, known


def _or(x: _Bits, y: _Bits) -> _Bits:
    ones = x[0] | y[0]  # one of them decides
    return ones, x[1] & y[1] | ones


def _and(x: _Bits, y: _Bits) -> _Bits:
    zeros = x[1] & ~x[0] | y[1] & ~y[0]
    return x[0] & y[0], x[1] & y[1] | zeros


def _select(x: _Bits, y: _Bits, _: _Bits) -> _Bits:
    known = x[1] & y[1] & ~(x[0] ^ y[0])
    return x[0] & known, known


_OPERATIONS: Final[Mapping[str, Callable[..., _Bits]]] = MappingProxyType(
    {"mov": _move, "or": _or, "and": _and, "selp": _select}
)
