"""What a unit reads and should give, for each batch of calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpcompiler.streams import Environment, Spill

_TARGET = "target"


class StoredSamples:
    """Samples in memory, or on disk where they do not fit; each is one batch of calibration data.

    Args:
        spill: Where they are kept that have no room.
        piece: Number of the unit.
        room: Bytes for samples in memory.
        device: Where samples are wanted.
    """

    def __init__(self, spill: Spill, piece: int, room: int, device: torch.device) -> None:
        self._spill = spill
        self._piece = piece
        self._room = room
        self._device = device
        self._held: dict[int, Environment] = {}
        self._batches: list[int] = []

    def add(self, batch: int, inputs: Sequence[Any], target: Tensor) -> None:
        """Keep a sample."""
        sample: Environment = {str(number): value for number, value in enumerate(inputs)}
        sample[_TARGET] = target
        size = sum(t.numel() * t.element_size() for t in sample.values() if isinstance(t, Tensor))
        self._batches.append(batch)
        if size <= self._room:
            self._room -= size
            # Cloned, as what goes to disk is: a view would keep all of what it is a part of.
            self._held[batch] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in sample.items()
            }
        else:
            self._spill.write(self._piece, batch, sample)

    @property
    def room(self) -> int:
        """Bytes that are left."""
        return self._room

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._batches)

    def batch(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], Tensor]:
        """Return the inputs of a sample, and what the unit should give for them."""
        (index,) = indices
        number = self._batches[index]
        sample = self._held.get(number)
        if sample is None:
            sample = self._spill.read(self._piece, number, self._device)
        inputs = tuple(sample[str(i)] for i in range(len(sample) - 1))
        return inputs, sample[_TARGET]
