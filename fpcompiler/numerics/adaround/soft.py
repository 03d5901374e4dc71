"""A quantized weight whose roundings can be learned: each value is between its two neighbours.

AdaRound (arXiv 2004.10568) learns whether a value is rounded up or down. In a floating-point format
each value has a step of its own (FP4DiT, arXiv 2503.15465, section 3.3), and with scales that are
given its two neighbours are fixed: the soft value is ``low + width h``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.adaround.neighbours import code_of, lower_position, upper_position
from fpcompiler.numerics.adaround.rectified import inverse_rectified_sigmoid, rectified_sigmoid
from fpcompiler.numerics.given import quantize_with
from fpcompiler.numerics.rounding import decode
from fpcompiler.numerics.scaling import dequantize, expand_scale
from fpcompiler.operand import Operand

_TRUST: Final = 0.8
_EDGE: Final = 0.02


class Parametrization(enum.Enum):
    """What is learned for each value; ``h`` is the rectified sigmoid.

    ``LOGIT`` learns ``V`` of ``h(V)``. ``SCALE_AWARE`` learns ``V'`` of ``h(V' / s)`` (FP4DiT, eq.
    8), where ``s`` is the step of the value: the derivative of the soft value is then the same in
    every binade. Here ``s`` is in units of the scale, so that the rate of learning does not depend
    on the size of the weights, as it does in the paper.
    """

    LOGIT = "logit"
    SCALE_AWARE = "scale-aware"


@dataclass(frozen=True, eq=False)
class SoftWeight:
    """A weight between its neighbours; :meth:`of` makes one.

    Attributes:
        operand: Element format and scale levels.
        scales: Of each level, as given.
        nearest: The codes of round-to-nearest, uint8 ``[..., K]``.
        position: Of the lower neighbour, int16; see :mod:`.neighbours`.
        low: The value of the lower neighbour, fp32.
        width: How far the upper one is above it, fp32; 0 where the lower is the largest number.
        rest: Where between them the weight is, 0 to 1, fp32; 1 only where that is rounded.
        divisor: ``s`` of the parametrization, or None if that has none.
    """

    operand: Operand
    scales: tuple[Tensor, ...]
    nearest: Tensor
    position: Tensor
    low: Tensor
    width: Tensor
    rest: Tensor
    divisor: Tensor | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        scales: tuple[Tensor, ...],
        operand: Operand,
        *,
        parametrization: Parametrization = Parametrization.LOGIT,
        layer: str = "",
    ) -> SoftWeight:
        """Return the neighbours of a weight.

        A weight that is a number of the format is the lower neighbour itself. What lies beyond the
        largest number is clipped to it.

        Args:
            weight: ``[..., K]``, any floating-point dtype.
            scales: In the form that :func:`fpcompiler.numerics.quantize` returns.
            operand: Element format and scale levels.
            parametrization: What is learned.
            layer: Named in errors.

        Raises:
            NumericsError: If the weight is not floating-point or holds NaN or infinity, the scales
                do not fit or are not positive numbers, or the format has no zero.
        """
        spec = operand.format
        nearest = quantize_with(weight, scales, operand, layer=layer)
        value = weight.detach().float()
        total = _total(value, scales, operand, layer)
        quotient = (value / total).clamp_(-spec.max, spec.max)
        position = lower_position(quotient, spec)
        below = quotient < 0
        lower, upper = (
            decode(code_of(p, below, spec), spec)
            for p in (position, upper_position(position, spec))
        )
        width = upper.sub_(lower)
        step = torch.where(width > 0, width, 1.0)
        rest = quotient.sub_(lower).div_(step)
        aware = parametrization is Parametrization.SCALE_AWARE
        return cls(
            operand, scales, nearest, position, lower.mul_(total), width * total, rest,
            step if aware else None,
        )  # fmt: skip

    @classmethod
    def stacked(
        cls,
        weights: Sequence[Tensor],
        scales: Sequence[tuple[Tensor, ...]],
        operand: Operand,
        *,
        parametrization: Parametrization = Parametrization.LOGIT,
        layer: str = "",
    ) -> SoftWeight:
        """Return the neighbours of weights of one shape, ``[L, N, K]``, for :func:`.round_layers`.

        Args:
            weights: ``L`` times ``[N, K]``.
            scales: Of each; one for a whole tensor may have any shape.
            operand: See :meth:`of`.
            parametrization: See there.
            layer: See there.

        Raises:
            NumericsError: As :meth:`of` does.
        """
        levels = zip(*scales, strict=True)
        stacks = tuple(
            torch.stack([scale.reshape(1, 1) if scale.numel() == 1 else scale for scale in level])
            for level in levels
        )
        values = torch.stack([weight.detach().float() for weight in weights])
        return cls.of(values, stacks, operand, parametrization=parametrization, layer=layer)

    def initial(self, codes: Tensor | None = None) -> Tensor:
        """Return what is learned, at the start: there the soft weight is the (clipped) weight.

        Args:
            codes: Roundings to begin near to instead, such as those of :func:`.round_layers`. They
                count for :data:`_TRUST`, the weight for the rest.
        """
        h = self.rest
        if codes is not None:
            up = (codes != self.codes(torch.full_like(self.rest, -1.0))).to(h.dtype)
            # Within the clip, where the derivative is not 0 or all but that.
            h = torch.lerp(h, up, _TRUST).clamp_(_EDGE, 1 - _EDGE)
        alpha = inverse_rectified_sigmoid(h)
        return alpha if self.divisor is None else alpha.mul_(self.divisor)

    def alpha(self, learned: Tensor) -> Tensor:
        """Return the argument of the rectified sigmoid; autograd goes through."""
        return learned if self.divisor is None else learned / self.divisor

    def soft(self, learned: Tensor) -> Tensor:
        """Return the soft weight, fp32 ``[..., K]``; autograd goes through."""
        return self.low + self.width * rectified_sigmoid(self.alpha(learned))

    def codes(self, learned: Tensor) -> Tensor:
        """Return the codes of the upper neighbour where ``h >= 0.5`` and of the lower elsewhere."""
        spec = self.operand.format
        up = upper_position(self.position, spec)
        position = torch.where(learned >= 0, up, self.position)
        return code_of(position, self.position < 0, spec)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of codes with the scales of this weight, fp32."""
        return dequantize(codes, self.scales, self.operand)


def _total(value: Tensor, scales: tuple[Tensor, ...], operand: Operand, layer: str) -> Tensor:
    """Return the product of the scales, broadcastable to the weight."""
    if not operand.levels:
        return value.new_ones(1)
    total = expand_scale(scales, operand, value.shape[-1])
    if not bool(((total > 0) & total.isfinite()).all()):
        raise NumericsError(
            f"{describe_layer(layer)}: a scale is not a positive number. The scale of a group of "
            "zeros is 1."
        )
    return total
