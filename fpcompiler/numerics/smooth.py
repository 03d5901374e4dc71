"""SmoothQuant: range moved from the channels of an input to those of the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.powers import exact_power

_LARGEST_POWER: Final = 126
"""Bounds a factor so that it and its inverse are normal numbers of fp32."""


def smooth_scales(
    input_amax: Tensor,
    weights: Sequence[Tensor],
    *,
    alpha: float = 0.5,
    power_of_two: bool = False,
    layer: str = "",
) -> Tensor:
    """Return factors ``s`` for ``(x / s) (w * s)^T``, which is ``x w^T``.

    ``s_j = max|x_j|**alpha / max|w_j|**(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4), where
    the maximum of ``w_j`` is over all weights that share the input. A channel that is zero in the
    input or in all weights has the factor 1.

    Args:
        input_amax: Largest magnitude of each input channel over the calibration data, ``[K]``.
        weights: The weights that share the input, each ``[N_i, K]``; at least one.
        alpha: How much of the range moves to the weights, 0 to 1.
        power_of_two: Round each factor to the nearest power of two, so that applying it is exact.
        layer: Named in errors.

    Returns:
        fp32 ``[K]``, on the device of ``input_amax``; at least 2**-126 and at most 2**126.

    Raises:
        NumericsError: If the shapes do not fit, ``alpha`` is out of range, or a maximum is negative
            or no finite number.
    """
    _require_fit(input_amax, weights, alpha, layer)
    inputs = input_amax.detach().double()
    tops = [weight.detach().abs().amax(0).double() for weight in weights]
    outputs = torch.stack(tops).amax(0)
    both = torch.stack([inputs, outputs])
    if not bool((both.isfinite() & (both >= 0)).all()):
        raise NumericsError(
            f"{describe_layer(layer)}: the maxima of its input or weights hold NaN/Inf or negative "
            "numbers. Check the weights and the calibration data, or skip the layer."
        )
    power = alpha * inputs.log2() - (1 - alpha) * outputs.log2()
    power = power.masked_fill_((both == 0).any(0), 0.0).clamp_(-_LARGEST_POWER, _LARGEST_POWER)
    return exact_power(power.round()) if power_of_two else power.exp2().float()


def _require_fit(input_amax: Tensor, weights: Sequence[Tensor], alpha: float, layer: str) -> None:
    if not 0 <= alpha <= 1:
        raise NumericsError(f"{describe_layer(layer)}: alpha must be from 0 to 1, not {alpha}.")
    k = input_amax.numel()
    shapes = [list(weight.shape) for weight in weights]
    fits = all(len(shape) == 2 and shape[0] and shape[1] == k for shape in shapes)
    if input_amax.ndim != 1 or not shapes or not fits:
        raise NumericsError(
            f"{describe_layer(layer)}: maxima {list(input_amax.shape)} and weights {shapes} do not "
            "fit: [K] and at least one [N, K] with N > 0 are needed."
        )
