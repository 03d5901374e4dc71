"""Views of memory, as the native library is told of them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Final

import torch

from fpcompiler.native.program import RANK, View
from fpcompiler.runtime.program.record import Place

TYPES: Final[Mapping[torch.dtype, int]] = MappingProxyType(
    {
        torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3,
        torch.int64: 4, torch.int32: 5, torch.uint8: 6,
    }
)  # fmt: skip
"""``FpcType`` of each dtype that a view may have."""

_Axes = ctypes.c_int64 * RANK


def native_view(place: Place, base: int, offset: int) -> View:
    """Return a place as a structure, with sizes of 1 in front of its axes."""
    missing = RANK - len(place.sizes)
    sizes = _Axes(*(1,) * missing, *place.sizes)
    strides = _Axes(*(0,) * missing, *place.strides)
    return View(base, offset, sizes, strides, TYPES[place.dtype])


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of values that lie in order without gaps."""
    return tuple(prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def is_contiguous(place: object) -> bool:
    """Return whether values lie in order without gaps; axes of one value do not count."""
    if not isinstance(place, Place):
        return False
    wanted = contiguous_strides(place.sizes)
    sides = zip(place.sizes, place.strides, wanted, strict=True)
    return all(size == 1 or a == b for size, a, b in sides)


def broadcast(place: Place, sizes: Sequence[int]) -> Place:
    """Return a view that repeats values along the axes in which it has one, or which it lacks."""
    missing = len(sizes) - len(place.sizes)
    own = (*(1,) * missing, *place.sizes)
    strides = (*(0,) * missing, *place.strides)
    kept = tuple(0 if a != b else s for a, b, s in zip(own, sizes, strides, strict=True))
    return Place(place.buffer, place.offset, tuple(sizes), kept, place.dtype)


def joined(*views: Place) -> tuple[Place, ...]:
    """Return views of equal sizes with fewer axes: those that lie as one in all of them are one."""
    axes: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(views[0].sizes):
        strides = [view.strides[axis] for view in views]
        if size == 1:
            continue
        if axes and all(o == size * i for o, i in zip(axes[-1][1], strides, strict=True)):
            axes[-1] = (axes[-1][0] * size, strides)
        else:
            axes.append((size, strides))
    sizes = tuple(size for size, _ in axes)
    return tuple(
        Place(v.buffer, v.offset, sizes, tuple(s[i] for _, s in axes), v.dtype)
        for i, v in enumerate(views)
    )
