"""Pre-shifted exponent biases: channels of different range under one real scale (LLM-FP4).

LLM-FP4 (arXiv 2310.16836, eqs. 15, 18 and 19) gives channel ``j`` of an activation the bias
``rho + k_j``, with a real ``rho`` for the tensor and a whole number ``k_j``: ``x_j * 2**k_j`` is
quantized with the one scale that ``rho`` stands for, and column ``j`` of the weight is multiplied
by ``2**-k_j``.

A bias is the logarithm of a range: ``b = log2(max / Qmax)`` for the largest number ``max`` of the
format with bias 0 (eq. 7), and the scale of the tensor is ``Qmax / max``. Ranges are what is
computed with here, biases what is shown: so the exponents do not hang on the rounding of a
logarithm, and follow a tensor that is multiplied by a power of two exactly.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.rounding import round_to

_LARGEST_LIMIT: Final = 31
"""The largest exponent of a channel: that of a format with five exponent bits."""

_LEAST_SCALE: Final = 2.0**-95
"""The least scale of a tensor, so that its product with ``2**-k_j`` is a normal number of fp32."""

_LARGEST_BIAS: Final = 95
"""The largest difference of a bias from that of the format."""


class ShiftRounding(enum.Enum):
    """How ``b_j - rho`` becomes the whole number ``k_j``.

    Where ``Qmax`` is the largest magnitude of all, ``FLOOR`` clips no value within the range of its
    channel, ``ROUND`` (the paper, eq. 15) clips up to a factor of ``sqrt(2)``, and ``CODE`` (the
    released code, ``round(b_j) - round(rho)``) up to 2, and depends on the unit of the tensor.
    """

    FLOOR = "floor"
    ROUND = "round"
    CODE = "code"


@dataclass(frozen=True, eq=False)
class PreShift:
    """The biases of an activation: one real range and a whole number for each channel.

    Attributes:
        format: The element format.
        qmax: The largest magnitude that a shifted value can have without being clipped.
        exponents: ``k_j``, int32 ``[K]``, at least 0: channel ``j`` is multiplied by ``2**k_j``.
    """

    format: FloatSpec
    qmax: float
    exponents: Tensor

    @property
    def rho(self) -> float:
        """The bias of the tensor: ``rho`` of the paper."""
        return self.format.bias + math.log2(self.format.max / self.qmax)

    @property
    def scale(self) -> float:
        """The real scale of the tensor, a number of fp32."""
        return float(np.float32(self.qmax / self.format.max))

    def shifted(self, x: Tensor) -> Tensor:
        """Return ``x_j * 2**k_j`` for ``x`` ``[..., K]``: exact unless it overflows."""
        return _times_power(x, self.exponents)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the values that quantization with these biases turns ``x`` into.

        Args:
            x: ``[..., K]``, any floating-point dtype.

        Returns:
            fp32 ``[..., K]``: numbers of the format times ``scale * 2**-k_j``.
        """
        return self.unscaled(x).mul_(self.scale * exact_power(-self.exponents))

    def unscaled(self, x: Tensor) -> Tensor:
        """Return the numbers of the format that stand for ``x``, fp32 ``[..., K]``."""
        scale = torch.full((), self.scale, dtype=torch.float32, device=x.device)
        return round_to(self.shifted(x.float()) / scale, self.format)


def paper_limit(spec: FloatSpec) -> int:
    """Return ``2**e - 1``, the largest ``k_j`` of the paper's text and code (eq. 15 differs)."""
    return min((1 << spec.exponent_bits) - 1, _LARGEST_LIMIT)


def channel_bias(amax: Tensor, spec: FloatSpec) -> Tensor:
    """Return ``b_j``, the bias that puts the largest magnitude of a channel at the largest number.

    ``2**e - log2(Qmax) + log2(2 - 2**-m) - 1`` (LLM-FP4, eq. 7) for a format without NaN.

    Args:
        amax: Largest magnitudes, any shape.
        spec: The format.

    Returns:
        fp64 of the shape of ``amax``; infinity where it is 0.
    """
    return spec.bias + math.log2(spec.max) - amax.double().log2()


def preshift(
    amax: Tensor,
    spec: FloatSpec,
    *,
    rho: float | None = None,
    gamma: float = 1.0,
    rounding: ShiftRounding = ShiftRounding.FLOOR,
    limit: int | None = None,
    layer: str = "",
) -> PreShift:
    """Split the biases of channels into one real number and a whole number for each.

    Args:
        amax: Largest magnitude of each channel over the calibration data, ``[K]``. A channel that
            was always zero is not shifted.
        spec: The format.
        rho: The bias of the tensor; by default the least bias of a channel, so that ``Qmax`` is the
            largest magnitude of all.
        gamma: Multiplies ``Qmax``: the part of the range that is kept.
        rounding: How ``k_j`` is rounded.
        limit: The largest ``k_j``; by default :func:`paper_limit`.
        layer: Named in errors.

    Returns:
        The biases, ``k_j = clip(round(b_j - rho), 0, limit)``.

    Raises:
        NumericsError: If ``amax`` is not ``[K]`` of finite numbers of at least 0, ``gamma`` is not
            positive, or ``limit`` is not 0 to 31.
    """
    limit = paper_limit(spec) if limit is None else limit
    _require_maxima(amax, gamma, limit, layer)
    largest = float(amax.amax()) if amax.numel() else 0.0
    if rho is not None:
        _require_bias(rho, spec, layer)
        largest = spec.max * 2.0 ** (spec.bias - rho)
    qmax = max(gamma * (largest or spec.max), spec.max * _LEAST_SCALE)
    steps = _steps(amax.detach().double(), qmax, spec, rounding)
    exponents = steps.masked_fill_(amax == 0, 0.0).clamp_(0, limit).to(torch.int32)
    return PreShift(spec, qmax, exponents)


def fold(weight: Tensor, exponents: Tensor, *, layer: str = "") -> Tensor:
    """Return the weight with column ``j`` multiplied by ``2**-k_j``, exactly.

    Args:
        weight: ``[N, K]``, any floating-point dtype.
        exponents: ``k_j``, int32 ``[K]``.
        layer: Named in errors.

    Returns:
        The dtype and shape of ``weight``.

    Raises:
        NumericsError: If a value of the result has no exact number in the dtype.
    """
    if exponents.shape != weight.shape[-1:]:
        raise NumericsError(
            f"{describe_layer(layer)}: a weight {list(weight.shape)} needs as many exponents as "
            f"columns, not {list(exponents.shape)}."
        )
    folded = _times_power(weight, -exponents)
    if not torch.equal(_times_power(folded, exponents), weight):
        raise NumericsError(
            f"{describe_layer(layer)}: weights times 2**-{int(exponents.max())} are below the "
            f"normal numbers of {weight.dtype}. Fold in fp32, or lower the limit of the exponents."
        )
    return folded


def _times_power(x: Tensor, exponents: Tensor) -> Tensor:
    """Return ``x_j * 2**e_j`` in the dtype of ``x``; 16 bits do not hold every such power."""
    power = exact_power(exponents)
    return x * power if x.dtype == torch.float64 else (x.float() * power).to(x.dtype)


def _steps(amax: Tensor, qmax: float, spec: FloatSpec, rounding: ShiftRounding) -> Tensor:
    """Return ``b_j - rho`` rounded to whole numbers, fp64; anything where ``amax`` is 0."""
    if rounding is ShiftRounding.CODE:
        rho = spec.bias + math.log2(spec.max / qmax)
        return channel_bias(amax, spec).round_().sub_(round(rho))
    # b_j - rho is log2(ratio). In fp64 a quotient of fp32 numbers never rounds to a power of two.
    ratio = qmax / amax
    if rounding is ShiftRounding.ROUND:
        return ratio.log2().round_()
    return torch.frexp(ratio).exponent.double().sub_(1)


def _require_bias(rho: float, spec: FloatSpec, layer: str) -> None:
    if not abs(rho - spec.bias) <= _LARGEST_BIAS:
        raise NumericsError(
            f"{describe_layer(layer)}: a bias rho of {rho} makes a scale that fp32 cannot hold; it "
            f"must be within {_LARGEST_BIAS} of {spec.bias}."
        )


def _require_maxima(amax: Tensor, gamma: float, limit: int, layer: str) -> None:
    if amax.ndim != 1 or not bool((amax.isfinite() & (amax >= 0)).all()):
        raise NumericsError(
            f"{describe_layer(layer)}: the maxima of channels {list(amax.shape)} must be finite "
            "numbers [K] of at least 0. Check the calibration inputs, or skip the layer."
        )
    if not 0 < gamma < math.inf or not 0 <= limit <= _LARGEST_LIMIT:
        raise NumericsError(
            f"{describe_layer(layer)}: gamma {gamma} must be positive, and the limit {limit} of "
            f"the exponents 0 to {_LARGEST_LIMIT}."
        )
