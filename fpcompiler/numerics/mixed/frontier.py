"""The best choices for every budget: a knapsack with one of a few things from each row.

A row is a layer and its things are formats, each with a size and a damage. The states after each
layer are those that no other is better than in both (Nemhauser and Ullmann, Management Science 15,
1969). Layers of a model have few different shapes, so that few sums of sizes are possible and the
states stay few: all of them are kept, and the result is exact. Where they would be more than
:data:`MOST_STATES` only the best of each small range of sizes is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError

MOST_STATES: Final = 1 << 15
"""How many states are kept after each layer."""


@dataclass(frozen=True)
class Point:
    """A choice for every layer that no other choice beats.

    Attributes:
        size: The sum of sizes.
        damage: The sum of damages, the least that is possible for this size.
        chosen: For each layer the number of what was chosen.
    """

    size: int
    damage: float
    chosen: tuple[int, ...]


class Frontier:
    """All points where less damage takes a larger size.

    Args:
        sizes: For each layer the size of each choice, such as its bits.
        damages: Their damages, finite and not negative.
        most_states: See :data:`MOST_STATES`.

    Raises:
        NumericsError: If a layer has no choice, or as many sizes as damages are not given.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        damages: Sequence[Sequence[float]],
        most_states: int = MOST_STATES,
    ) -> None:
        if [len(row) for row in sizes] != [len(row) for row in damages] or not all(sizes):
            raise NumericsError("each layer needs choices, each with a size and a damage.")
        self._steps: list[tuple[Tensor, Tensor]] = []
        size = torch.zeros(1, dtype=torch.int64)
        damage = torch.zeros(1, dtype=torch.float64)
        for row, losses in zip(sizes, damages, strict=True):
            own = torch.tensor(row), torch.tensor(losses, dtype=torch.float64)
            choices = _undominated(*own)
            every = (size + own[0][choices, None]).flatten()
            total = (damage + own[1][choices, None]).flatten()
            kept = _thinned(every, _undominated(every, total), most_states)
            self._steps.append((choices[kept // len(size)], kept % len(size)))
            size, damage = every[kept], total[kept]
        self._sizes, self._damages = size, damage

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self._sizes)

    @property
    def least(self) -> int:
        """The least size that is possible."""
        return int(self._sizes[0])

    @property
    def most(self) -> int:
        """The size from which on the damage does not become less."""
        return int(self._sizes[-1])

    def within(self, size: int) -> Point:
        """Return the point with the least damage that is not larger than a size.

        Raises:
            NumericsError: If the size is less than the least one.
        """
        found = int(torch.searchsorted(self._sizes, size, right=True)) - 1
        if found < 0:
            raise NumericsError(f"a size of {size} cannot be reached; the least is {self.least}.")
        return self._point(found)

    def spread(self, count: int) -> list[Point]:
        """Return up to ``count`` points from the least to the largest size, evenly by size."""
        limits = torch.linspace(self.least, self.most, count, dtype=torch.float64).round().long()
        found = torch.searchsorted(self._sizes, limits, right=True) - 1
        return [self._point(number) for number in sorted(set(found.tolist()))]

    def _point(self, number: int) -> Point:
        size, damage = int(self._sizes[number]), float(self._damages[number])
        chosen = []
        for choices, parents in reversed(self._steps):
            chosen.append(int(choices[number]))
            number = int(parents[number])
        return Point(size, damage, tuple(reversed(chosen)))


def _undominated(sizes: Tensor, damages: Tensor) -> Tensor:
    """Return the states with less damage than all that are not larger, by size; of equals one."""
    order = damages.argsort(stable=True)
    order = order[sizes[order].argsort(stable=True)]
    ordered = damages[order]
    before = torch.cat([torch.tensor([torch.inf]).double(), ordered.cummin(0).values[:-1]])
    return order[ordered < before]


def _thinned(sizes: Tensor, kept: Tensor, most: int) -> Tensor:
    """Return the first state and the best of each of ``most - 1`` equal ranges of sizes."""
    if len(kept) <= most:
        return kept
    own = sizes[kept]
    ranges = (own - own[0]).double() / (own[-1] - own[0] + 1) * (most - 1)
    last = torch.cat([ranges.long().diff() > 0, torch.tensor([True])])
    last[0] = True
    return kept[last]
