"""Calibration data on its way through a graph, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx

from fpcompiler.errors import FpcompilerError
from fpcompiler.streams import Environment, Segments, Spill


class Stream:
    """All batches on their way, kept on disk between units.

    Args:
        segments: The graph, a piece for each unit.
        folder: Where they are kept.
        inputs: Of the graph, for each batch.
    """

    def __init__(self, segments: Segments, folder: Path, inputs: Sequence[Environment]) -> None:
        self._segments = segments
        self._spill = Spill(folder)
        self._inputs = inputs

    def show(self, number: int, batch: int, nodes: Sequence[fx.Node], *, keep: bool) -> list[Any]:
        """Return the values of some nodes of a unit for a batch, and keep what it left if asked."""
        found: dict[fx.Node, Any] = {}
        taps = {node: partial(found.__setitem__, node) for node in nodes}
        left = self._run(number, batch, taps)
        if keep:
            self._spill.write(number, batch, left)
        return [found[node] for node in nodes]

    def advance(self, number: int) -> None:
        """Keep what a unit leaves for all batches."""
        for batch in range(len(self._inputs)):
            if not self._spill.has(number, batch):
                self._spill.write(number, batch, self._run(number, batch, {}))

    def is_at(self, number: int) -> bool:
        """Return whether everything before a unit is kept."""
        return all(self._spill.has(number - 1, batch) for batch in range(len(self._inputs)))

    def forget(self, number: int) -> None:
        """Delete what a unit left."""
        self._spill.forget(number)

    def forget_all(self) -> None:
        """Delete everything."""
        self._spill.forget_all()

    def forget_all_but(self, number: int) -> None:
        """Delete what other units left."""
        self._spill.forget_all_but(number)

    def _run(
        self, number: int, batch: int, taps: Mapping[fx.Node, Callable[[Any], None]]
    ) -> Environment:
        device = self._segments.device
        if number:
            before = self._spill.read(number - 1, batch, device)
        else:
            before = {name: tensor.to(device) for name, tensor in self._inputs[batch].items()}
        try:
            return self._segments.run(number, before, taps)
        except FpcompilerError as error:
            error.add_note(f"in calibration batch {batch + 1}")
            raise
