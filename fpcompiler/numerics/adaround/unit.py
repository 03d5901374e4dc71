"""Learns the roundings of all weights of one unit of reconstruction: a layer, a transformer block.

As in BRECQ (arXiv 2102.05426) the loss is the squared error of the unit's output against that of
the original. It is relative to the error of round-to-nearest, and the regularizer is a mean over
the values: with the 0.01 times a sum of the published code, the balance between them, and so the
result, would depend on the size of weights, inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.adaround.learning import learn
from fpcompiler.numerics.adaround.options import Ended, RoundOptions
from fpcompiler.numerics.adaround.soft import SoftWeight

Forward = Callable[[Sequence[Tensor], tuple[Tensor, ...]], Tensor]
"""Computes the output of a unit from its weights and inputs; autograd goes through."""

_PROBED: Final = 2
"""Batches on which the checks during learning look."""


class Samples(Protocol):
    """Calibration data of a unit; where they are kept is their own affair."""

    def __len__(self) -> int:
        """Return how many samples there are."""
        ...

    def batch(self, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the inputs of some samples, and what the unit should give for them.

        Both are on the device of the weights.
        """
        ...


@dataclass(frozen=True, eq=False)
class UnitResult:
    """The roundings of a unit.

    Attributes:
        codes: Of each weight, uint8; those of round-to-nearest if ``kept`` is false.
        kept: Whether the learned ones were better on the samples held out.
        error: Mean squared error of the output on the samples held out, learned.
        nearest_error: The same of round-to-nearest.
        iterations: How many were made.
        ended: Why not more.
    """

    codes: tuple[Tensor, ...]
    kept: bool
    error: float
    nearest_error: float
    iterations: int
    ended: Ended


def round_unit(
    forward: Forward,
    weights: Sequence[SoftWeight],
    samples: Samples,
    held_out: Samples,
    options: RoundOptions | None = None,
    *,
    start: Sequence[Tensor | None] = (),
    layer: str = "",
) -> UnitResult:
    """Learn the roundings of all weights of a unit together.

    Deterministic where ``forward`` is, unless a limit of time makes fewer iterations.

    Args:
        forward: Of the unit. The weights come in the given order, fp32; on CUDA it may run under
            autocast to bfloat16.
        weights: The neighbours of each weight, all on one device; at least one.
        samples: What is learned from.
        held_out: What decides; none of it should be in ``samples``.
        options: How to learn.
        start: Codes of each weight to begin near to, such as :func:`.round_layers` finds; None for
            a weight that has none. They are the result if learning makes them no better.
        layer: Named in errors.

    Returns:
        Codes that are never worse on ``held_out`` than those of round-to-nearest.

    Raises:
        NumericsError: If there is no weight or sample, or the output does not have the shape of the
            target or holds NaN or infinity.
    """
    options = options or RoundOptions()
    if not weights or not len(samples) or not len(held_out):
        raise NumericsError(
            f"{describe_layer(layer)}: learning its rounding takes at least one weight, one sample "
            f"and one sample held out, not {len(weights)}, {len(samples)} and {len(held_out)}."
        )
    unit = _Unit(forward, weights, layer)
    nearest = [weight.nearest for weight in weights]
    nearest_error = unit.error(nearest, held_out, _in_order(len(held_out), options.batch))
    learned = learn(weights, _Reconstruction(unit, samples, options), options, start)
    batches = _in_order(len(held_out), options.batch)
    found = [learned.codes]
    if any(codes is not None for codes in start):
        pairs = zip(weights, start, strict=True)
        found.append(tuple(w.nearest if codes is None else codes for w, codes in pairs))
    errors = [unit.error(codes, held_out, batches) for codes in found]
    error = min(errors)
    kept = error < nearest_error
    chosen = found[errors.index(error)] if kept else tuple(nearest)
    return UnitResult(chosen, kept, error, nearest_error, learned.iterations, learned.ended)


@dataclass(frozen=True, eq=False)
class _Unit:
    """A unit and the neighbours of its weights."""

    forward: Forward
    weights: Sequence[SoftWeight]
    layer: str

    def squared_error(self, values: Sequence[Tensor], data: Samples, indices: list[int]) -> Tensor:
        """Return the mean squared error of the output on some samples, fp32."""
        inputs, target = data.batch(indices)
        output = self.forward(values, inputs)
        if output.shape != target.shape:
            raise NumericsError(
                f"{describe_layer(self.layer)}: its output {list(output.shape)} does not have the "
                f"shape of the target {list(target.shape)}."
            )
        return (output.float() - target.float()).square().mean()

    @torch.no_grad()
    def error(self, codes: Sequence[Tensor], data: Samples, batches: Sequence[list[int]]) -> float:
        """Return the mean squared error with codes, over batches weighted by their samples.

        Raises:
            NumericsError: If it is not finite.
        """
        pairs = zip(self.weights, codes, strict=True)
        values = [weight.values(own) for weight, own in pairs]
        total = torch.zeros((), dtype=torch.float64, device=values[0].device)
        for indices in batches:
            total += self.squared_error(values, data, indices).double() * len(indices)
        error = float(total) / sum(map(len, batches))
        if not error < float("inf"):
            raise NumericsError(
                f"{describe_layer(self.layer)}: its output or the target holds NaN/Inf. Check the "
                "calibration inputs, or leave this unit rounded to nearest."
            )
        return error


class _Reconstruction:
    """The error of the output, relative to that of round-to-nearest."""

    def __init__(self, unit: _Unit, samples: Samples, options: RoundOptions) -> None:
        self._unit = unit
        self._samples = samples
        self._batch = min(options.batch, len(samples))
        self._generator = torch.Generator().manual_seed(options.seed)
        self._left: list[int] = []
        self._mixed = options.mixed_precision and unit.weights[0].low.is_cuda
        self._probe = _in_order(len(samples), self._batch)[:_PROBED]
        nearest = [weight.nearest for weight in unit.weights]
        error = unit.error(nearest, samples, self._probe)
        values = sum(weight.low.numel() for weight in unit.weights)
        self._factor = values / error if error > 0 else 0.0

    def gradients(self, iteration: int, h: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative by each ``h``, times the number of all values."""
        pairs = list(zip(self._unit.weights, h, strict=True))
        soft = [
            torch.addcmul(weight.low, weight.width, own).requires_grad_() for weight, own in pairs
        ]
        with torch.enable_grad():
            with torch.autocast("cuda", torch.bfloat16, enabled=self._mixed):
                loss = self._unit.squared_error(soft, self._samples, self._next())
            # A weight that only decides a choice, by argmax for instance, has no derivative.
            slopes = torch.autograd.grad(loss, soft, allow_unused=True, materialize_grads=True)
        return [
            (slope * self._factor).mul_(weight.width)
            for (weight, _), slope in zip(pairs, slopes, strict=True)
        ]

    def error(self, codes: Sequence[Tensor]) -> float:
        """Return the mean squared error on the first batches."""
        return self._unit.error(codes, self._samples, self._probe)

    def _next(self) -> list[int]:
        """Return the samples of the next step: each comes once before any comes again."""
        if len(self._left) < self._batch:
            self._left = torch.randperm(len(self._samples), generator=self._generator).tolist()
        batch, self._left = self._left[: self._batch], self._left[self._batch :]
        return batch


def _in_order(count: int, batch: int) -> list[list[int]]:
    """Return all samples in batches."""
    return [list(range(start, min(start + batch, count))) for start in range(0, count, batch)]
