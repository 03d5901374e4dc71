"""What a visit of the layers will take, said after its first batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpcompiler.calibration.groups import Group
from fpcompiler.calibration.statistics import Accumulator


@dataclass(frozen=True)
class Preflight:
    """A prediction.

    Attributes:
        groups: Groups of layers.
        pieces: Pieces that the model is run in, for lack of memory for all statistics at once.
        batches: Batches that run through each piece.
        statistics_bytes: The most that statistics take at a time.
        input_bytes: What the largest input of a layer takes for one batch.
        seconds: Running the model and collecting statistics. What the work on the groups takes is
            predicted when the first of them is done, see :meth:`work_seconds`.
    """

    groups: int
    pieces: int
    batches: int
    statistics_bytes: int
    input_bytes: int
    seconds: float

    @classmethod
    def predict(
        cls, pieces: Sequence[Sequence[Group]], batches: int, sample: int, tokens: int, first: float
    ) -> Preflight:
        """Return what is to be expected.

        Args:
            pieces: Groups of layers whose statistics are collected together.
            batches: How many there are.
            sample: Tokens that are kept for each group.
            tokens: Rows of the first batch.
            first: Seconds that the first piece took for the first batch.
        """
        groups = [group for piece in pieces for group in piece]
        return cls(
            len(groups),
            len(pieces),
            batches,
            max(sum(Accumulator.bytes(group.k, sample) for group in piece) for piece in pieces),
            max(4 * group.k for group in groups) * tokens,
            first * batches * len(groups) / len(pieces[0]),
        )

    @staticmethod
    def work_seconds(groups: Sequence[Group], first: float) -> float:
        """Return what the work on groups takes, from the seconds that the first of them took."""
        return first * sum(group.weights for group in groups) / max(groups[0].weights, 1)

    @staticmethod
    def of_work(groups: Sequence[Group], first: float) -> str:
        """Return the prediction of :meth:`work_seconds` in a line."""
        seconds = Preflight.work_seconds(groups, first)
        return f"{_number(len(groups), 'group')} of layers: about {_time(seconds)} of work on them"

    def __str__(self) -> str:
        """Return the prediction in a line."""
        return (
            f"{_number(self.groups, 'group')} of layers in {_number(self.pieces, 'piece')}, "
            f"{_number(self.batches, 'batch', 'batches')}: about "
            f"{_size(self.statistics_bytes + 4 * self.input_bytes)} beside the model, and "
            f"{_time(self.seconds)} for running it"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{max(1, count / 2**20):.0f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(1, seconds):.0f} s"


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
