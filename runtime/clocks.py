"""Clocks that take the time of work on a device."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments; how far they are apart is known once :meth:`wait` has returned."""

    def mark(self) -> Any:
        """Return the moment at which the work that was asked for so far is done."""

    def wait(self) -> None:
        """Wait until all of that work is done."""

    def seconds(self, first: Any, second: Any) -> float:
        """Return how long after one mark another one came."""


class HostClock:
    """For devices that work while the program waits."""

    def mark(self) -> float:
        """Return the time."""
        return time.perf_counter()

    def wait(self) -> None:
        """Return at once."""

    def seconds(self, first: float, second: float) -> float:
        """Return the difference."""
        return second - first


class CudaClock:
    """For CUDA, which works after the program has gone on: marks are events on its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Return an event that is recorded now."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Return the time between two events."""
        return float(first.elapsed_time(second)) / 1e3


def clock_of(device: torch.device) -> Clock:
    """Return the clock for a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
