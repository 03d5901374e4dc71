"""Learns roundings with Adam; what the loss is, the caller says."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from fpcompiler.numerics.adaround.options import Ended, RoundOptions
from fpcompiler.numerics.adaround.rectified import (
    WARM_UP,
    beta_at,
    rectified_sigmoid,
    rectified_slope,
    undecided_slope,
)
from fpcompiler.numerics.adaround.soft import SoftWeight

_CHECKS: Final = 25
_GAIN: Final = 0.995
"""An error below this part of the least so far is a gain."""
_TIMED: Final = 20
"""Iterations after which the time of one is known; in the first ones memory is allocated."""
_UNTIMED: Final = 5
_LOOKED: Final = 10
"""Iterations between later looks at the clock: on CUDA each waits for the device."""


class Objective(Protocol):
    """What is made small."""

    def gradients(self, iteration: int, h: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative of the loss by each ``h``.

        The loss is relative to that of round-to-nearest. Its derivative comes times the number of
        values, so that neither the regularizer nor the epsilon of Adam depends on that number.
        """
        ...

    def error(self, codes: Sequence[Tensor]) -> float:
        """Return the error of codes on data that are learned from."""
        ...


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learned.

    Attributes:
        codes: Of each weight, uint8.
        iterations: How many were made.
        ended: Why not more.
    """

    codes: tuple[Tensor, ...]
    iterations: int
    ended: Ended


def learn(
    weights: Sequence[SoftWeight],
    objective: Objective,
    options: RoundOptions,
    start: Sequence[Tensor | None] = (),
) -> Learned:
    """Return the codes with the least error among those looked at in the checks and at the end.

    Args:
        weights: At least one, all on one device.
        objective: What is made small.
        options: See there.
        start: Codes to begin near to, for each weight or for none; None: the weight itself.
    """
    state = _State(weights, options, start or [None] * len(weights))
    plan = _Plan(options, weights[0].low.device)
    best, least, idle = state.codes(), math.inf, 0
    iteration, ended = 0, Ended.ITERATIONS
    while iteration < plan.iterations:
        state.step(objective, iteration, iteration / plan.iterations)
        iteration += 1
        plan.count(iteration)
        if not plan.checks_after(iteration):
            continue
        codes = state.codes()
        error = objective.error(codes)
        warm = iteration >= WARM_UP * plan.iterations
        idle = 0 if error < _GAIN * least or not warm else idle + 1
        if error < least:
            best, least = codes, error
        if options.patience and idle >= options.patience:
            ended = Ended.PATIENCE
            break
    if ended is Ended.ITERATIONS and plan.iterations < options.iterations:
        ended = Ended.TIME
    return Learned(best, iteration, ended)


class _State:
    """The logits and their optimizer."""

    def __init__(
        self,
        weights: Sequence[SoftWeight],
        options: RoundOptions,
        start: Sequence[Tensor | None],
    ) -> None:
        self._weights = weights
        pairs = zip(weights, start, strict=True)
        self._logits = [weight.initial(codes) for weight, codes in pairs]
        self._strength = options.regularizer
        self._adam = torch.optim.Adam(self._logits, lr=options.learning_rate, fused=True)

    def codes(self) -> tuple[Tensor, ...]:
        """Return the codes of the logits as they are."""
        pairs = zip(self._weights, self._logits, strict=True)
        return tuple(weight.codes(logit) for weight, logit in pairs)

    def step(self, objective: Objective, iteration: int, progress: float) -> None:
        """Make one step of Adam."""
        pairs = list(zip(self._weights, self._logits, strict=True))
        values = [rectified_sigmoid(weight.alpha(logit)) for weight, logit in pairs]
        beta = beta_at(progress)
        slopes = objective.gradients(iteration, values)
        for (weight, logit), h, slope in zip(pairs, values, slopes, strict=True):
            if beta is not None:
                slope.add_(undecided_slope(h, beta), alpha=self._strength)
            slope.mul_(rectified_slope(weight.alpha(logit)))
            logit.grad = slope if weight.divisor is None else slope.div_(weight.divisor)
        self._adam.step()


class _Plan:
    """How many iterations are made, and which are followed by a check."""

    def __init__(self, options: RoundOptions, device: torch.device) -> None:
        self.iterations = options.iterations
        self._seconds = options.seconds
        self._device = device
        self._start = self._now()
        self._settled = self._start

    def checks_after(self, iteration: int) -> bool:
        """Return whether a check follows, as the last iteration always has."""
        step = max(1, self.iterations // _CHECKS)
        return iteration % step == 0 or iteration == self.iterations

    def count(self, iteration: int) -> None:
        """Note that an iteration was made, and plan fewer of them if time would not suffice."""
        if self._seconds is None or (iteration > _TIMED and iteration % _LOOKED):
            return
        now = self._now()
        if now - self._start >= self._seconds:
            self.iterations = min(self.iterations, iteration)
        if iteration == _UNTIMED:
            self._settled = now
        if iteration != _TIMED:
            return
        each = max((now - self._settled) / (_TIMED - _UNTIMED), 1e-9)
        left = self._seconds - (now - self._start)
        self.iterations = min(self.iterations, iteration + max(0, int(left / each)))

    def _now(self) -> float:
        if self._device.type == "cuda" and self._seconds is not None:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
