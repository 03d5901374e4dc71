"""Timing on a machine that is not quiet: short slots, one candidate after the other, many rounds.

What is compared are the two slots of the same round. With one thread a slot counts the time of the
processor, which is blind to other programs. With more it counts the time of the clock, and a slot
in which the process was interrupted does not count.
"""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.benchmarks.cpu_linear.problem import Work

PAUSE = 0.006
"""Seconds before a slot of several threads: those of the candidate before it wait actively."""

TICK = 0.004
"""Seconds that an interruption may take."""

HARMLESS = 0.01
"""The part of a slot that interruptions may take."""

ENOUGH = 3
"""Clean slots that a median needs."""

MOST_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Seconds of one product in each round.

    Attributes:
        seconds: The mean over the slot of each round.
        clean: Whether the slot was not interrupted.
    """

    seconds: tuple[float, ...]
    clean: tuple[bool, ...]

    @property
    def is_noisy(self) -> bool:
        """Whether there are too few clean rounds, so that all are counted."""
        return sum(self.clean) < ENOUGH

    @property
    def median(self) -> float:
        """The median over the clean rounds, or over all if there are too few."""
        pairs = zip(self.seconds, self.clean, strict=True)
        return statistics.median([s for s, clean in pairs if clean or self.is_noisy])


@dataclass(frozen=True)
class Speed:
    """How many times faster a candidate is than another; noisy: too few rounds were clean."""

    ratio: float
    is_noisy: bool


def speed(candidate: Timing, other: Timing) -> Speed:
    """Return the median of the ratios of the rounds in which both are clean.

    If there are too few of them, all rounds are counted.
    """
    both = [a and b for a, b in zip(candidate.clean, other.clean, strict=True)]
    ratios = [b / a for a, b in zip(candidate.seconds, other.seconds, strict=True)]
    clean = [ratio for ratio, ok in zip(ratios, both, strict=True) if ok]
    is_noisy = len(clean) < ENOUGH
    return Speed(statistics.median(ratios if is_noisy else clean), is_noisy)


@dataclass
class _Pace:
    """How many calls make a slot of a candidate, and which copy of the weight is next."""

    work: Work
    calls: int
    turn: int = 0

    def call(self) -> None:
        self.work.run(self.turn % self.work.copies)
        self.turn += 1


def measure(works: Mapping[str, Work], threads: int, rounds: int, slot: float) -> dict[str, Timing]:
    """Return the timings of candidates, in rounds of one slot each, in an order that changes.

    Args:
        works: The candidates.
        threads: How many threads they use.
        rounds: How many slots each one gets.
        slot: Seconds of a slot, at least; one call may take longer.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    paces = {name: _pace(work, slot) for name, work in works.items()}
    slots: dict[str, list[tuple[float, bool]]] = {name: [] for name in works}
    order, generator = list(works), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            if threads > 1:
                time.sleep(PAUSE)
            taken, interruptions = _slot(paces[name], clock)
            clean = threads == 1 or interruptions * TICK <= HARMLESS * taken
            products = paces[name].calls * works[name].products
            slots[name].append((taken / products, clean))
    return {
        name: Timing(tuple(s for s, _ in pairs), tuple(ok for _, ok in pairs))
        for name, pairs in slots.items()
    }


def _pace(work: Work, slot: float) -> _Pace:
    pace = _Pace(work, 1)
    # Each copy once before the one that counts: some prepare themselves when they are first used.
    for _ in range(work.copies // work.products + 1):
        start = time.perf_counter()
        pace.call()
        taken = time.perf_counter() - start
    pace.calls = max(1, min(MOST_CALLS, round(slot / max(taken, 1e-7))))
    return pace


def _slot(pace: _Pace, clock: Callable[[], float]) -> tuple[float, int]:
    """Return the seconds of a slot, and how often another program took the processor."""
    if pace.calls > 1:  # wakes the threads; a single long call does so itself
        pace.call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = clock()
    for _ in range(pace.calls):
        pace.call()
    taken = clock() - start
    return taken, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
