"""The number formats, one row each; everything else about a format is derived from its row.

Names are spelled as in MLIR (``f4E2M1FN``: 4 bits, 2 exponent bits, 1 mantissa bit, finite numbers
only). What LLM-FP4 adds to the standards (E1M2, E3M0, E1M4, E4M1, E5M0, E1M6 and E2M5), the finite
E3M4 (FP4DiT) and the unsigned E4M3 (scales of NVFP4) follow the same pattern although MLIR has no
such type. With one exponent bit all steps are equal: E1M2, E1M4 and E1M6 are the symmetric INT4,
INT6 and INT8.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

from fpcompiler.errors import FormatError


class Specials(enum.Enum):
    """Which codes of a format are not numbers."""

    NONE = "none"
    """Every code is a finite number (OCP FP4 and FP6)."""
    NAN = "nan"
    """The magnitude with all bits set is NaN and there is no infinity (OCP E4M3, E8M0)."""
    IEEE = "ieee"
    """The top exponent holds infinity and NaN (OCP E5M2, IEEE-like E3M4)."""


@dataclass(frozen=True)
class FloatSpec:
    """One floating-point format of at most 8 bits.

    A code is ``sign | exponent | mantissa``. With exponent field ``p`` and fraction ``f`` its value
    is ``2**(p - bias) * (1 + f)`` for ``p > 0`` and ``2**(1 - bias) * f`` for ``p == 0``, except
    that a format without zero (``zero=False``: E8M0) has ``2**(p - bias)`` throughout.

    Attributes:
        name: The spelling of MLIR.
        exponent_bits: Width of the exponent field.
        mantissa_bits: Width of the mantissa field.
        bias: Exponent bias.
        specials: Which codes are not numbers.
        signed: Whether there is a sign bit.
        zero: Whether the exponent field 0 holds zero and the subnormal numbers.
        source: Where the format is defined.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = Specials.NONE
    signed: bool = True
    zero: bool = True
    source: str = ""

    @property
    def short(self) -> str:
        """The name that papers use: ``E2M1``, ``E8M0``, ``UE4M3``."""
        prefix = "" if self.signed or not self.zero else "U"
        return f"{prefix}E{self.exponent_bits}M{self.mantissa_bits}"

    @property
    def magnitude_bits(self) -> int:
        """Bits without the sign."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def storage_bits(self) -> int:
        """Bits that one code takes when packed: 4, 6 or 8."""
        return next(n for n in (4, 6, 8) if n >= self.magnitude_bits + self.signed)

    @property
    def code_count(self) -> int:
        """How many codes the format has, specials included."""
        return 1 << (self.magnitude_bits + self.signed)

    @property
    def nan_code(self) -> int | None:
        """The canonical code of NaN, or None if the format has none."""
        if self.specials is Specials.NONE:
            return None
        if self.specials is Specials.NAN:
            return (1 << self.magnitude_bits) - 1
        top = ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return top | 1 << max(self.mantissa_bits - 1, 0)

    @property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        top = (1 << self.magnitude_bits) - 1
        if self.specials is Specials.NAN:
            return top - 1
        if self.specials is Specials.IEEE:
            return (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1
        return top

    @cached_property
    def max(self) -> float:
        """The largest finite number."""
        return self.value(self.max_code)

    @property
    def max_exponent(self) -> int:
        """Floor of the binary logarithm of :attr:`max` (``emax`` of OCP MX)."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; the step below it is constant."""
        return (1 if self.zero else 0) - self.bias

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return self.value(1 if self.zero else 0)

    def value(self, code: int) -> float:
        """Return the value of one code, computed with Python floats from the definition.

        Raises:
            FormatError: If the format has no such code.
        """
        if not 0 <= code < self.code_count:
            raise FormatError(f"{self.name} has codes 0..{self.code_count - 1}, not {code}")
        magnitude = code & ((1 << self.magnitude_bits) - 1)
        sign = -1.0 if self.signed and code >> self.magnitude_bits else 1.0
        exponent = magnitude >> self.mantissa_bits
        fraction = (magnitude & ((1 << self.mantissa_bits) - 1)) / (1 << self.mantissa_bits)
        if self.specials is Specials.NAN and magnitude == (1 << self.magnitude_bits) - 1:
            return math.nan
        if self.specials is Specials.IEEE and exponent == (1 << self.exponent_bits) - 1:
            return math.nan if fraction else sign * math.inf
        if exponent == 0 and self.zero:
            return sign * math.ldexp(fraction, 1 - self.bias)
        return sign * math.ldexp(1 + fraction, exponent - self.bias)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, in order of the codes; NaN and infinity included."""
        return tuple(self.value(code) for code in range(self.code_count))

    def __str__(self) -> str:
        """Return the name."""
        return self.name


_OCP_MX = "OCP Microscaling Formats 1.0"
_OCP_FP8 = "OCP 8-bit Floating Point 1.0"
_LLM_FP4 = "LLM-FP4 (arXiv 2310.16836)"

_ROWS: Final = (
    #         name          e  m  bias
    FloatSpec("f4E2M1FN", 2, 1, 1, source=_OCP_MX),
    FloatSpec("f4E1M2FN", 1, 2, 0, source=_LLM_FP4),
    FloatSpec("f4E3M0FN", 3, 0, 3, source=_LLM_FP4),
    FloatSpec("f6E2M3FN", 2, 3, 1, source=_OCP_MX),
    FloatSpec("f6E3M2FN", 3, 2, 3, source=_OCP_MX),
    FloatSpec("f6E1M4FN", 1, 4, 0, source=_LLM_FP4),
    FloatSpec("f6E4M1FN", 4, 1, 7, source=_LLM_FP4),
    FloatSpec("f6E5M0FN", 5, 0, 15, source=_LLM_FP4),
    FloatSpec("f8E3M4", 3, 4, 3, Specials.IEEE, source="MLIR f8E3M4 (IEEE-like)"),
    FloatSpec("f8E3M4FN", 3, 4, 3, source="FP4DiT (arXiv 2503.15465), all codes finite"),
    FloatSpec("f8E1M6FN", 1, 6, 0, source=_LLM_FP4),
    FloatSpec("f8E2M5FN", 2, 5, 1, source=_LLM_FP4),
    FloatSpec("f8E4M3FN", 4, 3, 7, Specials.NAN, source=_OCP_FP8),
    FloatSpec("f8E5M2", 5, 2, 15, Specials.IEEE, source=_OCP_FP8),
    FloatSpec("f8E8M0FNU", 8, 0, 127, Specials.NAN, signed=False, zero=False, source=_OCP_MX),
    FloatSpec("f8E4M3FNU", 4, 3, 7, Specials.NAN, signed=False, source="NVFP4 block scales"),
)


def _table(rows: tuple[FloatSpec, ...]) -> Mapping[str, FloatSpec]:
    table = {row.name: row for row in rows}
    if len(table) != len(rows):
        raise FormatError("two formats have the same name")
    return MappingProxyType(table)


FORMATS: Final = _table(_ROWS)
"""Every format by name."""


def parse_format(text: str) -> FloatSpec:
    """Return the format that a text names: ``f4E2M1FN``, or short and in any case, ``e2m1``.

    Raises:
        FormatError: If there is no such format; the message lists the nearest names.
    """
    wanted = text.strip()
    if wanted in FORMATS:
        return FORMATS[wanted]
    full = re.sub(r"^(float|fp|f)\d*_?|_", "", wanted.lower())
    exact = [f for f in FORMATS.values() if re.sub(r"^f\d", "", f.name.lower()) == full]
    matches = [f for f in FORMATS.values() if f.short.lower() == full]
    if exact or matches:
        return (exact or matches)[0]
    near = difflib.get_close_matches(wanted, list(FORMATS), n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise FormatError(f"There is no format {text!r}. {hint}Formats: {', '.join(FORMATS)}.")
