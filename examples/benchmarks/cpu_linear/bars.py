"""The speeds that are promised for a processor with AVX-512 VNNI, and whether they were reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.benchmarks.cpu_linear.peers import FOUR_BIT_PEERS
from examples.benchmarks.cpu_linear.timing import Speed, Timing, speed

SHAPES = ((4096, 4096), (11008, 4096))
"""``(N, K)`` of the layers that the bars are about."""

BEST_INT4 = "best-int4"
"""Of the peers with 4-bit weights that were measured, the one that is the fastest."""


@dataclass(frozen=True)
class Bar:
    """How many times as fast as a peer a scheme must be.

    Attributes:
        rows: Rows of the input.
        scheme: The scheme.
        peer: The peer, or :data:`BEST_INT4`.
        wanted: The least ratio.
    """

    rows: int
    scheme: str
    peer: str
    wanted: float


BARS = (
    Bar(1, "w4a6", "torch-bf16", 5.5),
    Bar(1, "w4a6", "onednn-bf16", 3.8),
    Bar(1, "w4a6", "ort-int4-b32", 1.3),
    Bar(1, "w4a6", "ggml-mxfp4", 2.2),
    Bar(1, "w4a6", "read", 0.85),
    Bar(1, "w4a6-row", "read", 0.92),
    Bar(16, "w4a6", "torch-bf16", 3.0),
    Bar(16, "w4a6", BEST_INT4, 1.8),
    Bar(512, "w4a6", "torch-bf16", 1.85),
    Bar(512, "w4a6", "onednn-int8", 0.88),
    Bar(512, "w4a6-row", "torch-bf16", 2.0),
    Bar(512, "w4a6-row", "onednn-int8", 1.0),
    Bar(512, "w4a6-row", "int8-peak", 0.85),
)
"""Weights from memory, not from a cache."""


@dataclass(frozen=True)
class Verdict:
    """What was measured for a bar; None if the scheme or all of the peers are missing."""

    bar: Bar
    measured: Speed | None

    @property
    def is_passed(self) -> bool:
        """Whether the bar was reached, and not by a measurement that says nothing."""
        if self.measured is None or self.measured.is_noisy:
            return False
        return self.measured.ratio >= self.bar.wanted


def verdicts(shape: tuple[int, int], rows: int, timings: Mapping[str, Timing]) -> list[Verdict]:
    """Return the verdicts on the bars about some rows of one shape."""
    if shape not in SHAPES:
        return []
    return [Verdict(bar, _measured(bar, timings)) for bar in BARS if bar.rows == rows]


def _measured(bar: Bar, timings: Mapping[str, Timing]) -> Speed | None:
    peers: Sequence[str] = FOUR_BIT_PEERS if bar.peer == BEST_INT4 else (bar.peer,)
    found = [timings[name] for name in peers if name in timings]
    if bar.scheme not in timings or not found:
        return None
    speeds = [speed(timings[bar.scheme], other) for other in found]
    return min(speeds, key=lambda found: found.ratio)
