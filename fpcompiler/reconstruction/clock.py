"""Time for units of different size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

LEAST: Final = 1e-3
"""Seconds for a unit where the time is over: it makes the one step that is always made."""


class Clock:
    """Shares the time among units by their size, and says what the rest will take.

    Args:
        seconds: For all of them; None: no limit.
        sizes: Of each.
    """

    def __init__(self, seconds: float | None, sizes: Sequence[int]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._start = time.monotonic()
        self._sizes = list(sizes)
        self._done = 0

    def allowed(self) -> float | None:
        """Return the seconds that the next unit may take; None without a limit."""
        if self._end is None:
            return None
        share = (self._end - time.monotonic()) * self._sizes[0] / max(sum(self._sizes), 1)
        return max(share, LEAST)

    def done(self) -> None:
        """A unit is done."""
        self._done += self._sizes.pop(0)

    def left(self) -> float:
        """Return the seconds that the rest will take if it goes on like this."""
        return (time.monotonic() - self._start) * sum(self._sizes) / max(self._done, 1)

    def __str__(self) -> str:
        """Return the prediction in words."""
        left = self.left()
        return f"about {left / 60:.0f} min left" if left >= 120 else f"about {left:.0f} s left"
