"""What one operand of a GEMM looks like: an element format and the levels of its scale.

The text form is what is printed, stored in artifacts, and used as a type parameter in the IR::

    f4E2M1FN@row:f32/block32:f8E8M0FNU        a level for the row, then one for each 32 values
    f6E2M3FN@block32:f8E8M0FNU                OCP MX
    f4E2M1FN@tensor:f32/block16:f8E4M3FN      NVFP4
    f6E2M3FN@block32:f8E8M0FNU:floor          with a scale rounding other than the default

A value is ``decode(code)`` times the product of its scales. A GEMM contracts the last axis (K), and
blocks lie along it.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from fpcompiler.errors import FormatError
from fpcompiler.formats import FloatSpec, parse_format

F32: Final = "f32"
"""The name of a scale format that is a real number, kept as fp32."""


class Granularity(enum.Enum):
    """Which values share one scale."""

    TENSOR = "tensor"
    """All values of the tensor."""
    ROW = "row"
    """One output channel of a weight: all values along the last axis."""
    TOKEN = "token"
    """One token of an activation: all values along the last axis."""
    BLOCK = "block"
    """A run of values along the last axis."""


class ScaleRounding(enum.Enum):
    """How a scale is rounded to its format.

    With ``r = amax / max(element format)``: ``FLOOR`` is the rule of OCP MX,
    ``2**(floor(log2(amax)) - emax)``; ``CEIL`` the least scale that clips nothing; ``RNE`` the
    nearest scale to ``r``, ties to even; ``MSE`` the one of the two neighbours of ``r`` with the
    smaller squared error over the block.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    RNE = "rne"
    MSE = "mse"


BLOCK_SIZES: Final = (16, 32, 64, 128)
"""Lengths that a block may have."""

SCALE_FORMATS: Final = (F32, "f8E8M0FNU", "f8E4M3FN")
"""Formats that a scale may have."""


@dataclass(frozen=True)
class ScaleLevel:
    """One level of a scale.

    Attributes:
        granularity: Which values share a scale of this level.
        format: ``f32`` or the name of a format in :data:`SCALE_FORMATS`.
        block: Values per block; 0 unless the granularity is ``BLOCK``.
        rounding: How the scale is rounded; by default ``MSE`` to E8M0 and ``RNE`` otherwise.
    """

    granularity: Granularity
    format: str = F32
    block: int = 0
    rounding: ScaleRounding | None = None

    def __post_init__(self) -> None:
        """Check the level and fill in the default rounding.

        Raises:
            FormatError: If the level is not one that can be computed.
        """
        if self.format not in SCALE_FORMATS:
            raise FormatError(
                f"{self.format} cannot hold a scale; scale formats: {', '.join(SCALE_FORMATS)}."
            )
        is_block = self.granularity is Granularity.BLOCK
        if is_block and self.block not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise FormatError(f"a block of {self.block} values is not possible; sizes: {sizes}.")
        if not is_block and (self.block or self.format != F32):
            raise FormatError(f"a scale per {self.granularity.value} is f32 and no block: {self}.")
        if self.rounding is None:
            object.__setattr__(self, "rounding", self.default_rounding)
        if self.format == F32 and self.rounding is not ScaleRounding.RNE:
            raise FormatError("an f32 scale is not rounded to a grid: only rne is possible.")

    @property
    def default_rounding(self) -> ScaleRounding:
        """The rounding that the text form leaves out."""
        return ScaleRounding.MSE if self.format == "f8E8M0FNU" else ScaleRounding.RNE

    @property
    def is_real(self) -> bool:
        """Whether the scale is an arbitrary real number rather than a code of few bits."""
        return self.format == F32

    @property
    def spec(self) -> FloatSpec | None:
        """The format of the scale codes, or None for f32."""
        return None if self.is_real else parse_format(self.format)

    @classmethod
    def parse(cls, text: str) -> ScaleLevel:
        """Return the level that a text such as ``block32:f8E8M0FNU:floor`` describes.

        Raises:
            FormatError: If the text is not a level.
        """
        match = re.fullmatch(r"(tensor|row|token|block)(\d*):(\w+)(?::(\w+))?", text.strip())
        if not match:
            raise FormatError(
                f"{text!r} is no scale level; write for instance row:f32 or block32:f8E8M0FNU."
            )
        kind, size, name, rounding = match.groups()
        scale = F32 if name.lower() in (F32, "fp32") else parse_format(name).name
        try:
            mode = ScaleRounding(rounding) if rounding else None
        except ValueError:
            modes = ", ".join(mode.value for mode in ScaleRounding)
            raise FormatError(f"{rounding!r} is no scale rounding; one of {modes}.") from None
        return cls(Granularity(kind), scale, int(size or 0), mode)

    def __str__(self) -> str:
        """Return the text that parses back to this level."""
        size = str(self.block) if self.block else ""
        default = self.rounding is self.default_rounding or self.rounding is None
        mode = "" if default or self.rounding is None else f":{self.rounding.value}"
        return f"{self.granularity.value}{size}:{self.format}{mode}"


@dataclass(frozen=True)
class Operand:
    """An element format and the levels of its scale, coarsest first.

    Attributes:
        format: The element format.
        levels: None (values are rounded as they are), one level, or a real level over the tensor,
            row or token and then one over blocks.
    """

    format: FloatSpec
    levels: tuple[ScaleLevel, ...] = ()

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            FormatError: If the levels cannot be combined, or the format cannot hold elements.
        """
        if not self.format.signed:
            raise FormatError(f"{self.format} has no sign and cannot hold elements, only scales.")
        kinds = [level.granularity for level in self.levels]
        nested = len(kinds) == 2 and kinds[1] is Granularity.BLOCK is not kinds[0]
        if len(kinds) > 1 and not nested:
            raise FormatError(
                f"the levels {'/'.join(map(str, self.levels))} cannot be combined: at most one per "
                "tensor, row or token, and then one per block."
            )
        if nested and self.levels[1].is_real:
            raise FormatError(
                "a real scale per block makes the outer level redundant; leave it out."
            )

    @property
    def block(self) -> ScaleLevel | None:
        """The level over blocks, if there is one."""
        last = self.levels[-1] if self.levels else None
        return last if last and last.granularity is Granularity.BLOCK else None

    @property
    def outer(self) -> ScaleLevel | None:
        """The level over the tensor, row or token, if there is one."""
        first = self.levels[0] if self.levels else None
        return first if first and first.granularity is not Granularity.BLOCK else None

    @classmethod
    def parse(cls, text: str) -> Operand:
        """Return the operand that a text such as ``e2m1@row:f32/block32:e8m0`` describes.

        Raises:
            FormatError: If the text is not an operand.
        """
        return _parse(text)

    def bits_per_value(self, k: int) -> float:
        """Return the stored bits per value of a row of ``k`` values, scales of rows included."""
        bits = float(self.format.storage_bits)
        for level in self.levels:
            width = 32 if level.is_real else 8
            if level.granularity is Granularity.BLOCK:
                bits += width * -(-k // level.block) / k
            elif level.granularity is not Granularity.TENSOR:
                bits += width / k
        return bits

    def __str__(self) -> str:
        """Return the text that parses back to this operand."""
        return "@".join(
            [self.format.name, "/".join(map(str, self.levels))][: 1 + bool(self.levels)]
        )


@lru_cache(maxsize=256)
def _parse(text: str) -> Operand:
    name, _, levels = text.strip().partition("@")
    parts = [part for part in levels.split("/") if part] if levels else []
    return Operand(parse_format(name), tuple(ScaleLevel.parse(part) for part in parts))
