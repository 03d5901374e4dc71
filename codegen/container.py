"""Formats that an instruction reads, and the one in which it reads another format exactly.

Every value of a format in a container is a value of the container times one power of two, so that
nothing is rounded: the codes change and the power goes into the epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics.shift_lowering import Container, container

__all__ = ["NATIVE", "container_for"]

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


def container_for(source: FloatSpec, kind: str) -> Container:
    """Return the format in which a kind of instruction reads another: itself if it can.

    Args:
        source: The format of the values.
        kind: A name in :data:`NATIVE`.

    Raises:
        NumericsError: If none holds all finite values.
    """
    names = NATIVE[kind]
    if source.name in names:
        return Container(source, source, 0, 0)
    return container(source, 0, [FORMATS[name] for name in names])
