"""Clips as parts of the largest magnitude, searched from coarse to fine.

A clip is ``gamma * amax`` with ``gamma = 2**(-i / 128)``. Position 0 is no clip. Multiplying all
values by a power of two leaves each position what it was, so it leaves the choice what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import OptionError

PER_OCTAVE: Final = 128
"""Positions between a clip and half of it. Where one channel is far above the others, its weight
decides nearly alone, and a finer last step still makes the error smaller."""

Losses = Callable[[Sequence[Tensor]], Tensor]
"""From tensors of positions, int64 ``[n]`` each, to the loss of each, fp64 ``[len, n]``."""


@dataclass(frozen=True)
class Grid:
    """Which clips a search looks at; position 0, no clip, is always among them.

    Attributes:
        coarse: Distance of the positions that are looked at first, a power of two. Those between
            are looked at near the best one only.
        last: The smallest clip, in multiples of ``coarse``.
        first: The largest one, 0 or less. Below 0 it is above the largest magnitude, which then is
            rounded to a number below the largest: 4 instead of 6 at ``gamma = 1.5`` in E2M1. In
            short rows that can be better for all the other values.
    """

    coarse: int
    last: int
    first: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            OptionError: If ``coarse`` is no power of two, or position 0 is not in the range.
        """
        if self.coarse < 1 or self.coarse & (self.coarse - 1) or not self.first <= 0 <= self.last:
            raise OptionError(
                "a grid has a distance that is a power of two, a first position of 0 or less and "
                f"a last one of 0 or more, not {self.coarse}, {self.first} and {self.last}."
            )

    def positions(self) -> list[int]:
        """Return the coarse positions: no clip, smaller and smaller ones, and then larger ones."""
        steps = [*range(self.last + 1), *range(-1, self.first - 1, -1)]
        return [self.coarse * step for step in steps]

    def hold(self, position: Tensor) -> Tensor:
        """Return positions held within the range."""
        return position.clamp(self.coarse * self.first, self.coarse * self.last)

    def gamma(self, position: Tensor) -> Tensor:
        """Return the clips of positions as parts of the largest magnitude, fp32; 1 at 0."""
        first, last = self.coarse * self.first, self.coarse * self.last
        return _gammas(first, last, position.device)[position - first]


WEIGHT_GRID: Final = Grid(coarse=16, last=22, first=-5)
"""28 clips of 0.15 to 1.54, an eighth of an octave apart."""

ACTIVATION_GRID: Final = Grid(coarse=64, last=20, first=-1)
"""22 clips of 0.001 to 1.4, half an octave apart: one activation may be thousands of others."""


@dataclass(frozen=True)
class Found:
    """The best positions seen, int64 ``[n]``, and their losses, fp64 ``[n]``."""

    position: Tensor
    loss: Tensor


def scan(losses: Losses, grid: Grid, like: Tensor) -> Found:
    """Look at the coarse positions and then near the best one; of equal ones the first stays.

    Args:
        losses: What to make small, separately for each of n values.
        grid: Where to look.
        like: Any tensor ``[n]`` on the device.
    """
    zero = torch.zeros_like(like, dtype=torch.int64)
    positions = [zero + position for position in grid.positions()]
    return descend(losses, grid, _best(positions, losses(positions)))


def descend(losses: Losses, grid: Grid, found: Found) -> Found:
    """Look on both sides of the best positions, at half the distance each time."""
    distance = grid.coarse // 2
    while distance:
        near = [grid.hold(found.position + step) for step in (-distance, distance)]
        new = _best([found.position, *near], torch.cat([found.loss[None], losses(near)]))
        found, distance = new, distance // 2
    return found


def resume(losses: Losses, grid: Grid, position: Tensor) -> Found:
    """Look near positions that were found before, at their losses of now."""
    return descend(losses, grid, Found(position, losses([position])[0]))


@lru_cache(maxsize=32)
def _gammas(first: int, last: int, device: torch.device) -> Tensor:
    values = [2.0 ** (-i / PER_OCTAVE) for i in range(first, last + 1)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _best(positions: Sequence[Tensor], losses: Tensor) -> Found:
    """Return the positions with the least losses; of equal ones the first."""
    position, loss = positions[0], losses[0]
    for candidate, its_loss in zip(positions[1:], losses[1:], strict=True):
        better = its_loss < loss
        position = torch.where(better, candidate, position)
        loss = torch.where(better, its_loss, loss)
    return Found(position, loss)
