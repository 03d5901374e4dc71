"""GPTQ with few tokens: more damping, and a check on tokens that it has not seen.

With fewer tokens than inputs, ``X^T X`` says nothing about some directions, and GPTQ moves the
errors there: the damping should then be at least what the best linear shrinkage towards a multiple
of the identity asks for (OAS, Chen et al., arXiv 0907.4698). And where tokens are few, the last
quarter of those in the sample is held out: a weight is worth rounding with GPTQ if that, learned
from the other tokens, lowers the output error on these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.given import quantize_with
from fpcompiler.numerics.gptq import (
    MOST_DAMPING,
    GptqFactor,
    factorize,
    gptq_factored,
    output_error,
)
from fpcompiler.numerics.scaling import dequantize
from fpcompiler.operand import Operand

_ENOUGH: Final = 4
"""Tokens for each input from which on GPTQ is used unchecked."""

_PART: Final = 4
"""One in so many sampled tokens is held out."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What checks a weight; see :func:`hold_out`.

    Attributes:
        factor: Of the tokens that were not held out.
        hessian: ``X^T X`` over those that were, fp64 ``[K, K]``.
    """

    factor: GptqFactor
    hessian: Tensor


def are_few(tokens: int, inputs: int) -> bool:
    """Return whether GPTQ could fit noise: less than four tokens for each input."""
    return tokens < _ENOUGH * inputs


def shrinkage_damping(hessian: Tensor, tokens: int) -> float:
    """Return the damping that equals the OAS shrinkage of ``X^T X`` (arXiv 0907.4698, eq. 23).

    The shrunk matrix ``(1 - r) S + r mean(diag(S)) I`` is a multiple of ``S`` with a damping of
    ``r / (1 - r)`` times the mean of the diagonal. ``r`` grows with the number of directions that
    the inputs take and falls with the number of tokens. Inputs that were always zero do not count.

    Args:
        hessian: ``[K, K]``.
        tokens: How many it is the sum over, at least 1.

    Returns:
        From 0 to :data:`fpcompiler.numerics.gptq.MOST_DAMPING`.
    """
    wide = hessian.detach().double()
    diagonal = wide.diagonal()
    size = int((diagonal > 0).sum())
    trace_squared, squares = float(diagonal.sum()) ** 2, float(wide.square().sum())
    spread = (tokens + 1 - 2 / max(size, 1)) * (squares - trace_squared / max(size, 1))
    if spread <= 0:  # a multiple of the identity already
        return 0.0
    part = min(1.0, ((1 - 2 / size) * squares + trace_squared) / spread)
    return MOST_DAMPING if 2 * part >= 1 else max(0.0, part / (1 - part))


def split(hessian: Tensor, sample: Tensor, *, layer: str = "") -> tuple[Tensor, Tensor]:
    """Return ``X^T X`` over the tokens to learn from, and over the last quarter of the sample.

    The last, not any: neighbours in a text say much about each other.

    Args:
        hessian: ``X^T X`` over all tokens, those of the sample included, ``[K, K]``.
        sample: Some of the tokens, or all, ``[S, K]``; with none there is nothing to gain.
        layer: Named in errors.

    Returns:
        Both fp64 ``[K, K]``.

    Raises:
        NumericsError: If the shapes do not fit.
    """
    if sample.ndim != 2 or hessian.shape != (sample.shape[1],) * 2:
        raise NumericsError(
            f"{describe_layer(layer)}: a sample {list(sample.shape)} and a Hessian "
            f"{list(hessian.shape)} do not fit: [S, K] and [K, K] are needed."
        )
    count = -(-len(sample) // _PART)
    held = sample[len(sample) - count :].detach().double()
    unseen = held.T @ held
    rest = hessian.detach().double() - unseen
    # The sum over all tokens was rounded: what is left of an input that only they had is noise.
    noise = hessian.detach().double().diagonal() * 1e-6
    rest.diagonal().masked_fill_(rest.diagonal() <= noise, 0)
    dead = rest.diagonal() == 0
    rest[dead] = 0
    rest[:, dead] = 0
    return rest, unseen


def hold_out(
    hessian: Tensor,
    sample: Tensor,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    layer: str = "",
) -> HeldOut:
    """Return what is needed to check weights on the last quarter of the sampled tokens.

    Args:
        hessian: See :func:`split`.
        sample: See there.
        act_order: See :func:`fpcompiler.numerics.gptq.factorize`.
        damping: See there.
        layer: Named in errors.

    Raises:
        NumericsError: If the shapes do not fit, or the tokens that are left give no factor.
    """
    rest, unseen = split(hessian, sample, layer=layer)
    return HeldOut(factorize(rest, act_order=act_order, damping=damping, layer=layer), unseen)


def held_out_error(
    weight: Tensor,
    held: HeldOut,
    operand: Operand,
    *,
    scales: tuple[Tensor, ...] | None = None,
    layer: str = "",
) -> float:
    """Return the output error of GPTQ on the tokens held out, relative to round-to-nearest.

    Args:
        weight: ``[N, K]``.
        held: Of its input.
        operand: Element format and scale levels.
        scales: See :func:`fpcompiler.numerics.gptq.gptq`.
        layer: Named in errors.

    Returns:
        Below 1 where GPTQ is better; 1 where neither makes an error.

    Raises:
        NumericsError: As :func:`fpcompiler.numerics.gptq.gptq_factored` does.
    """
    codes, used = gptq_factored(weight, held.factor, operand, scales=scales, layer=layer)
    nearest = quantize_with(weight, used, operand, layer=layer)
    ours, plain = (
        float(output_error(weight, dequantize(c, used, operand), held.hessian).sum())
        for c in (codes, nearest)
    )
    return ours / plain if plain > 0 else 1.0
