"""One piece of memory for all values of a program: those that live at different times share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

ALIGNMENT: Final = 64
"""Of every value; prepared activations need it, and it is a line of the cache."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """When and how large a value is.

    Attributes:
        nbytes: Its size.
        first, last: The operations that write and last read it.
    """

    nbytes: int
    first: int
    last: int


def lay_out(lifetimes: Mapping[int, Lifetime]) -> tuple[dict[int, int], int]:
    """Return the offset of each value, and the size of the whole.

    The largest value is placed first, each as low as those that live at the same time allow
    (greedy by size; Pisarchyk and Lee, arXiv 2001.03288).
    """
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, Lifetime]] = []
    size = 0
    for key, life in sorted(lifetimes.items(), key=lambda item: (-item[1].nbytes, item[0])):
        nbytes = -(-max(life.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        at = 0
        for begin, end, other in placed:  # sorted by begin
            if other.first > life.last or other.last < life.first:
                continue
            if at + nbytes <= begin:
                break
            at = max(at, end)
        offsets[key] = at
        placed.append((at, at + nbytes, life))
        placed.sort(key=lambda item: item[0])
        size = max(size, at + nbytes)
    return offsets, size


class Arenas:
    """Memory for the values of programs, one piece for each of those that run at the same time."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """Return memory of at least a size, which is the caller's until it is given back."""
        try:
            found = self._free.pop()
        except IndexError:  # Another thread may have been faster: asking before would not do.
            return torch.empty(max(nbytes, 1), dtype=torch.uint8)
        return found if found.nbytes >= nbytes else torch.empty(nbytes, dtype=torch.uint8)

    def give_back(self, arena: Tensor) -> None:
        """Let another run have it."""
        self._free.append(arena)
