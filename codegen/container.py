"""Formats that an instruction reads, and formats that it reads in a wider container.

Every value of a format in a container is a value of the container times one power of two, so that
nothing is rounded: the codes change and the power goes into the epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from fpcompiler.formats import FORMATS, FloatSpec

__all__ = ["Container", "NATIVE", "exact_container"]

_F8F6F4: Final = ("f4E2M1FN", "f6E3M2FN", "f6E2M3FN", "f8E4M3FN", "f8E5M2")

NATIVE: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "mxf4": ("f4E2M1FN",),
        "nvf4": ("f4E2M1FN",),
        "mxf8f6f4": _F8F6F4,
        "f8f6f4": _F8F6F4,
        "fp8": ("f8E4M3FN", "f8E5M2"),
    }
)
"""Element formats that each kind of instruction reads, by the kind's name in the targets.

The narrowest stand first, and of two equally narrow ones the one that holds more formats, so that
fewer kernels are needed.
"""


@dataclass(frozen=True)
class Container:
    """A format and the one in which its values are stored for an instruction.

    Attributes:
        source: The format of the values.
        element: The format that the instruction reads.
        shift: The stored value is the value times ``2**shift``.
    """

    source: str
    element: str
    shift: int = 0

    @property
    def codes(self) -> tuple[int, ...]:
        """The code of the element format for each code of the source format, in order.

        Codes that are no finite number become the element's code of NaN, or of its largest number
        if it has none.
        """
        source, element = FORMATS[self.source], FORMATS[self.element]
        # Keyed by sign as well, because 0.0 == -0.0.
        table = {_key(v): code for code, v in enumerate(element.values) if math.isfinite(v)}
        lost = element.max_code if element.nan_code is None else element.nan_code
        return tuple(
            table[_key(math.ldexp(v, self.shift))] if math.isfinite(v) else lost
            for v in source.values
        )


def exact_container(source: FloatSpec, elements: Sequence[str]) -> Container | None:
    """Return the first of some formats that holds all finite values of another, or None.

    Args:
        source: The format of the values.
        elements: Names of the formats that an instruction reads, best first.
    """
    if source.name in elements:
        return Container(source.name, source.name)
    found = ((name, _shift(source, FORMATS[name])) for name in elements)
    return next((Container(source.name, n, s) for n, s in found if s is not None), None)


@lru_cache(maxsize=1024)
def _shift(source: FloatSpec, element: FloatSpec) -> int | None:
    """Return the least power of two that maps a format into another, or None."""
    values, room = _magnitudes(source), _magnitudes(element)
    shifts = sorted(range(-32, 33), key=abs)
    return next((n for n in shifts if {math.ldexp(v, n) for v in values} <= room), None)


def _magnitudes(spec: FloatSpec) -> set[float]:
    return {abs(v) for v in spec.values if math.isfinite(v)}


def _key(value: float) -> tuple[float, float]:
    return value, math.copysign(1.0, value)
