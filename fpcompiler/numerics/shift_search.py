"""Searches for pre-shifted exponent biases by the error of the layer's output.

LLM-FP4 (arXiv 2310.16836, section 4.2) takes the bias of a channel from its largest magnitude and
searches one real bias for the tensor. A channel that is large in a few tokens only would have no
bits left for the others, so here the root mean square of a channel, and what lies between the two,
are candidates as well; and so is no shift at all, so that the result is never worse than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.preshift import PreShift, ShiftRounding, paper_limit, preshift
from fpcompiler.numerics.scaling import dequantize, quantize
from fpcompiler.numerics.scratch import chunks
from fpcompiler.operand import Operand

GAMMAS: Final = tuple(2.0 ** (-step / 2) for step in range(17))
"""Ranges as parts of the largest magnitude: 1 to 1/256, two in each octave. A few activations may
be hundreds of times all others."""

_NEAR: Final = (2.0**-0.25, 1.0, 2.0**0.25)
"""Ranges that are looked at around the best of :data:`GAMMAS`."""

_COARSE_TOKENS: Final = 256
_FINALISTS: Final = 8


def channel_ranges(amax: Tensor, gram: Tensor, tokens: int) -> list[Tensor]:
    """Return what may be taken as the range of each channel, relative to one another.

    Args:
        amax: Largest magnitude of each channel over the calibration data, ``[K]``.
        gram: The sum of ``x^T x`` over all tokens, ``[K, K]``.
        tokens: How many tokens there were.

    Returns:
        Largest magnitude, geometric mean of the two, root mean square: ``[K]`` each, with the same
        largest value.
    """
    rms = (gram.diagonal() / max(tokens, 1)).clamp(min=0).sqrt()
    rms = rms.masked_fill(amax == 0, 0.0)
    largest = amax.amax()
    ranges = [amax, (amax * rms).sqrt(), rms]
    return [own * (largest / own.amax().clamp(min=1e-38)) for own in ranges]


def search_rho(
    x: Tensor,
    weights: Sequence[Tensor],
    specs: Sequence[FloatSpec],
    *,
    ranges: Sequence[Tensor] = (),
    gammas: Sequence[float] = GAMMAS,
    rounding: ShiftRounding = ShiftRounding.FLOOR,
    limit: int | None = None,
    layer: str = "",
) -> PreShift:
    """Return the biases, and the format, of an input with one static scale.

    The error is ``sum_i |(quantize(x) - x) w_i^T|**2``. Candidates are ``Qmax = gamma * max|x|`` in
    each format, for each way to measure channels; ``k_j`` follows each of them. They are compared
    on some tokens first; the best of them, their neighbours, and those that clip nothing, on all.
    Equal errors go to the given format without shifts.

    Args:
        x: Calibration inputs ``[T, K]``.
        weights: The quantized weights that share the input, each ``[N_i, K]``; at least one.
        specs: The formats to choose among; at least one. The given one comes first.
        ranges: Of :func:`channel_ranges`; by default the largest magnitudes in ``x`` alone.
        gammas: The candidates for ``Qmax``; at least one.
        rounding: As for :func:`preshift`.
        limit: As for :func:`preshift`.
        layer: Named in errors.

    Returns:
        The best biases. Memory beside the inputs is a few chunks of tokens and, where the weights
        have more rows than columns, their Gram matrix ``[K, K]``.

    Raises:
        NumericsError: As :func:`preshift` does, or if the shapes do not fit.
    """
    if not gammas or not specs:
        raise NumericsError(f"{describe_layer(layer)}: there is no range or no format to try.")
    errors = _OutputErrors(x, weights, layer)
    ranges = ranges or [x.detach().abs().amax(0)]

    def shift(spec: FloatSpec, own: Tensor, most: int | None, gamma: float) -> PreShift:
        return preshift(own, spec, gamma=gamma, rounding=rounding, limit=most, layer=layer)

    measured = [(ranges[0], 0), *((own, limit) for own in ranges)]
    tried = [(spec, own, most) for spec in specs for own, most in measured]
    coarse = [(*candidate, gamma) for candidate in tried for gamma in gammas]
    step = max(1, len(x) // _COARSE_TOKENS)
    found = errors.of([shift(*candidate) for candidate in coarse], slice(None, None, step))
    finalists = [shift(*candidate, max(gammas)) for candidate in tried]
    for index in found.argsort(stable=True)[:_FINALISTS].tolist():
        spec, own, most, gamma = coarse[index]
        finalists += [shift(spec, own, most, gamma * near) for near in _NEAR]
    return finalists[int(errors.of(finalists).argmin())]


def search_powers(
    x: Tensor,
    weights: Sequence[Tensor],
    operand: Operand,
    *,
    ranges: Sequence[Tensor] = (),
    limit: int,
    layer: str = "",
) -> Tensor:
    """Return ``k_j`` for an input whose scales are computed at each call.

    The error is that of :func:`search_rho`. Candidates are the powers for each way to measure
    channels, and half of each power, with two thresholds between one power and the next; all of
    them with the largest ``k_j`` that is allowed and with that of the paper; and no shift.

    Args:
        x: Calibration inputs ``[T, K]``.
        weights: The quantized weights that share the input, each ``[N_i, K]``; at least one.
        operand: Of the input.
        ranges: Of :func:`channel_ranges`; by default the largest magnitudes in ``x`` alone.
        limit: The largest ``k_j``.
        layer: Named in errors.

    Returns:
        int32 ``[K]``; zeros where no candidate has a smaller error than no shift.

    Raises:
        NumericsError: As :func:`search_rho` does.
    """
    errors = _OutputErrors(x, weights, layer)
    ranges = ranges or [x.detach().abs().amax(0)]
    measured = [*ranges, *(own.sqrt() for own in ranges)]
    tried = [
        preshift(own, operand.format, gamma=gamma, limit=most, layer=layer).exponents
        for own in measured
        for gamma in (1.0, 2.0**0.5)
        for most in sorted({limit, min(limit, paper_limit(operand.format))})
    ]
    tried.insert(0, torch.zeros_like(tried[0]))
    return tried[int(errors.of([_Dynamic(operand, exponents) for exponents in tried]).argmin())]


class _Dynamic:
    """An input that is multiplied by powers of two and then quantized as at each call."""

    def __init__(self, operand: Operand, exponents: Tensor) -> None:
        self._operand = operand
        self._exponents = exponents

    def quantize(self, x: Tensor) -> Tensor:
        power = exact_power(self._exponents)
        values = dequantize(*quantize(x * power, self._operand), self._operand)
        return values.div_(power)


class _OutputErrors:
    """The squared error of the outputs for ways to quantize the input."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], layer: str) -> None:
        fits = all(weight.ndim == 2 and weight.shape[1] == x.shape[-1] for weight in weights)
        if x.ndim != 2 or not x.numel() or not weights or not fits:
            raise NumericsError(
                f"{describe_layer(layer)}: inputs {list(x.shape)} and weights "
                f"{[list(weight.shape) for weight in weights]} do not fit: [T, K] with T > 0, and "
                "at least one [N, K], are needed."
            )
        matrices = [weight.detach().to(x.device, torch.float32) for weight in weights]
        self._x = x.detach()
        self._by_gram = sum(map(len, matrices)) > x.shape[1]
        self._matrix = _gram(matrices) if self._by_gram else torch.cat(matrices).T

    def of(self, candidates: Sequence[PreShift | _Dynamic], tokens: slice = slice(None)) -> Tensor:
        """Return the error of each candidate, fp64."""
        x = self._x[tokens]
        errors = torch.zeros(len(candidates), dtype=torch.float64, device=x.device)
        for part in chunks(len(x), x.shape[1], x.device):
            own = x[part].float()
            for index, candidate in enumerate(candidates):
                difference = candidate.quantize(own).sub_(own)
                outputs = difference @ self._matrix
                squares = outputs.mul_(difference) if self._by_gram else outputs.square_()
                errors[index] += squares.sum(dtype=torch.float64)
        return errors


def _gram(matrices: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i w_i^T w_i``, of which the squared length of an output is a quadratic form."""
    gram = matrices[0].T @ matrices[0]
    for matrix in matrices[1:]:
        gram.addmm_(matrix.T, matrix)
    return gram
