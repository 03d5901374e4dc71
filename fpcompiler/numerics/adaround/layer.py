"""Learns the roundings of linear layers from the Gram matrices of their inputs.

The output error of ``x w^T`` over all tokens is ``d (x^T x) d^T``, summed over the rows ``d`` of
the quantized weight minus the original: an iteration costs ``N K K`` and needs no tokens, which is
less than a batch of them wherever K is smaller than that. Layers of equal shape are one product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.adaround.flips import flip
from fpcompiler.numerics.adaround.learning import learn
from fpcompiler.numerics.adaround.options import Ended, RoundOptions
from fpcompiler.numerics.adaround.soft import SoftWeight


@dataclass(frozen=True, eq=False)
class LayersResult:
    """The roundings of layers of one shape.

    Attributes:
        codes: uint8 ``[L, N, K]``; those of round-to-nearest where ``kept`` is false.
        kept: Whether the learned ones were better on the tokens held out, bool ``[L]``.
        error: Squared error of the outputs on the tokens held out, learned, fp64 ``[L]``; the sum
            or mean over tokens, as the Gram matrix is.
        nearest_error: The same of round-to-nearest.
        iterations: How many were made.
        ended: Why not more.
    """

    codes: Tensor
    kept: Tensor
    error: Tensor
    nearest_error: Tensor
    iterations: int
    ended: Ended


def round_layers(
    target: Tensor,
    weight: SoftWeight,
    gram: Tensor,
    held_out: Tensor,
    options: RoundOptions | None = None,
    *,
    layer: str = "",
) -> LayersResult:
    """Learn the roundings of layers of equal shape.

    Every row is normalized by its own error with round-to-nearest, so that multiplying weights or
    inputs by powers of two changes nothing. What was learned is then brought to a minimum that no
    single flip lowers, see :mod:`.flips`.

    Args:
        target: What the weights should do, ``[L, N, K]``: the original weights.
        weight: The neighbours of ``target``, of the same shape, with the scales stacked along ``L``
            (``[L, 1, 1]`` for a scale per tensor).
        gram: ``x^T x`` over the tokens to learn from, sum or mean, ``[L, K, K]``.
        held_out: The same over the tokens that decide.
        options: How to learn; of these, batch, seed and precision do not matter here.
        layer: Named in errors.

    Raises:
        NumericsError: If shapes do not fit, or a Gram matrix is not finite.
    """
    _require_fit(target, weight, (gram, held_out), layer)
    start, options = time.perf_counter(), options or RoundOptions()
    target = target.detach().float()
    objective = _GramObjective(target, weight, gram)
    learned = learn([weight], objective, options)
    seconds = options.seconds
    left = None if seconds is None else max(0.0, seconds - (time.perf_counter() - start))
    codes = objective.polish(learned.codes[0], left)
    error, nearest_error = (
        _errors(target, weight.values(c), held_out).sum(-1) for c in (codes, weight.nearest)
    )
    kept = error < nearest_error
    chosen = torch.where(kept[:, None, None], codes, weight.nearest)
    return LayersResult(chosen, kept, error, nearest_error, learned.iterations, learned.ended)


class _GramObjective:
    """The error of each row, relative to that of round-to-nearest."""

    def __init__(self, target: Tensor, weight: SoftWeight, gram: Tensor) -> None:
        mean = gram.double().diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        self._gram = (gram.double() / torch.where(mean > 0, mean, 1.0)).float()
        self._weight = weight
        nearest = weight.values(weight.nearest) - target
        # The unit of a row: squares of small weights would underflow in fp32.
        norm = nearest.double().square().mean(-1, keepdim=True).sqrt()
        unit = torch.where(norm > 0, norm, 1.0)
        self._width = (weight.width / unit).float()
        self._offset = ((weight.low - target) / unit).float()
        self._factor = self._relative(_row_errors((nearest / unit).float(), self._gram))

    def gradients(self, iteration: int, h: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative by ``h``, times the values in a row."""
        slope = torch.addcmul(self._offset, self._width, h[0]) @ self._gram
        return [slope.mul_(self._width).mul_(self._factor)]

    def error(self, codes: Sequence[Tensor]) -> float:
        """Return the mean over rows of the error relative to round-to-nearest, times ``2 K``."""
        errors = _row_errors(self._difference(self._up(codes[0])), self._gram)
        return float(errors.mul_(self._factor).mean())

    def polish(self, codes: Tensor, seconds: float | None) -> Tensor:
        """Return codes that no single flip makes better, if time suffices."""
        up = self._up(codes)
        up = flip(up, self._difference(up), self._width, self._gram, seconds)
        return self._weight.codes(torch.where(up, 1.0, -1.0))

    def _relative(self, errors: Tensor) -> Tensor:
        """Return ``2 K / error`` of each row, and 0 where round-to-nearest makes none."""
        none = errors <= 0
        return (2.0 * self._width.shape[-1] / errors.masked_fill(none, 1.0)).masked_fill_(none, 0.0)

    def _up(self, codes: Tensor) -> Tensor:
        return codes != self._weight.codes(torch.full_like(self._width, -1.0))

    def _difference(self, up: Tensor) -> Tensor:
        return torch.addcmul(self._offset, self._width, up.float())


def _row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Return ``d G d^T`` of each row, ``[L, N, 1]``."""
    return (difference @ gram).mul_(difference).sum(-1, keepdim=True)


def _errors(target: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """Return the error of each row, fp64 ``[L, N]``, a layer at a time to save memory."""
    rows = []
    for own, new, matrix in zip(target, values, gram, strict=True):
        difference = new.double() - own.double()
        rows.append((difference @ matrix.double()).mul_(difference).sum(-1))
    return torch.stack(rows)


def _require_fit(
    target: Tensor, weight: SoftWeight, grams: tuple[Tensor, Tensor], layer: str
) -> None:
    square = (len(target), target.shape[-1], target.shape[-1])
    fits = target.ndim == 3 and target.shape == weight.low.shape and target.numel() > 0
    if not fits or any(gram.shape != square for gram in grams):
        shapes = [list(t.shape) for t in (target, weight.low, *grams)]
        raise NumericsError(
            f"{describe_layer(layer)}: weights, neighbours and Gram matrices {shapes} do not fit: "
            "[L, N, K] twice and [L, K, K] twice are needed."
        )
    if not all(bool(gram.isfinite().all()) for gram in grams):
        raise NumericsError(
            f"{describe_layer(layer)}: a Gram matrix of its input holds NaN/Inf. Check the "
            "calibration inputs, and sum x^T x in fp32 or fp64."
        )
