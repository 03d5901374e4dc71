"""GPTQ on floating-point grids: each column is rounded to make up for the errors of those before.

The columns of a weight are visited one after the other. The error of a rounded column is spread
over the columns not yet visited so that the output of the layer changes least (GPTQ, Frantar et
al., arXiv 2210.17323, algorithm 1). With ``H = X^T X`` over the inputs ``X`` and ``H^-1 = U^T U``,
``U`` upper triangular, column ``j`` leaves ``e_j = (w_j - q_j) / U_jj``, and ``w_i -= e_j U_ji``
for ``i > j``. Updates within a block of columns are made when a column is reached, and those of
later columns in one product for the whole block.

The scales are fixed before the first column is visited: only so can columns of one block be visited
in any order (activation order, and the static groups of MR-GPTQ, arXiv 2509.23202). A step of a
floating-point grid grows with the value, so a large correction can cost more than it gains; a row
whose output error ends above that of round-to-nearest keeps round-to-nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.rounding import decode, encode, round_into
from fpcompiler.numerics.scaling import expand_scale, quantize
from fpcompiler.numerics.scratch import Scratch, chunks
from fpcompiler.operand import Operand

MOST_DAMPING: Final = 1.0
"""Beyond it little of the Hessian but its diagonal is left."""

_LEAST_DAMPING: Final = 1e-6
"""What follows a damping of 0 that was too little."""


@dataclass(frozen=True, eq=False)
class GptqFactor:
    """A Hessian made ready for GPTQ; weights that have one input share it.

    Attributes:
        hessian: ``[K, K]``, as given.
        order: The columns in the order in which they are visited, int64 ``[K]``.
        upper: ``U`` of the damped Hessian in that order, fp64 ``[K, K]``. The Hessian is divided by
            the mean of its diagonal, so that its scale does not matter.
        damping: What was added to the diagonal, relative to its mean.
    """

    hessian: Tensor
    order: Tensor
    upper: Tensor
    damping: float


def factorize(
    hessian: Tensor, *, act_order: bool = True, damping: float = 0.01, layer: str = ""
) -> GptqFactor:
    """Return the factor of the inverse of a Hessian.

    If the damped Hessian is not positive definite, it is damped ten times more, and so on up to the
    mean of the diagonal. A column whose input was always zero (zero diagonal) gets no correction
    and gives none.

    Args:
        hessian: ``X^T X`` over the inputs of the layer, ``[K, K]``; the sum or the mean over
            tokens, any floating-point dtype. Computed in fp64.
        act_order: Whether columns are visited by falling diagonal rather than from left to right.
        damping: Added to the diagonal, relative to its mean over the columns that are not zero.
        layer: Named in errors.

    Returns:
        The factor, on the device of the Hessian.

    Raises:
        NumericsError: If the Hessian is not a square of finite numbers with a diagonal of at least
            0, the damping is negative, or no damping makes the Hessian positive definite.
    """
    _require_hessian(hessian, damping, layer)
    wide = hessian.detach().double()
    diagonal = wide.diagonal()
    live = diagonal > 0
    mean = diagonal.sum() / live.sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    order = torch.arange(len(wide), device=wide.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = wide[order[:, None], order] / mean
    ordered.diagonal().add_((~live[order]).double())
    while True:
        upper = _inverse_factor(ordered, damping)
        if upper is not None:
            return GptqFactor(hessian, order, upper, damping)
        damping = max(10 * damping, _LEAST_DAMPING)
        if damping > MOST_DAMPING:
            raise NumericsError(
                f"{describe_layer(layer)}: the Hessian of its input is not positive definite, even "
                f"with its mean diagonal added. It must be X^T X over calibration inputs; "
                "calibrate again, or quantize this layer without GPTQ."
            )


def gptq(
    weight: Tensor,
    hessian: Tensor,
    operand: Operand,
    *,
    scales: tuple[Tensor, ...] | None = None,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
    layer: str = "",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Quantize a weight so that the output of its layer changes least.

    The output error of each row, :func:`output_error`, is at most that of round-to-nearest with the
    same scales: a row that would end above it is rounded to nearest.

    Args:
        weight: ``[N, K]``, any floating-point dtype.
        hessian: ``[K, K]``; see :func:`factorize`.
        operand: Element format and scale levels.
        scales: The scales to use, in the form of :func:`fpcompiler.numerics.quantize`; by default
            those that it computes.
        act_order: See :func:`factorize`.
        damping: See :func:`factorize`.
        block: Columns whose corrections of later columns are applied together: speed and the
            order of sums depend on it.
        layer: Named in errors.

    Returns:
        Codes, uint8 ``[N, K]``, and scales, as :func:`fpcompiler.numerics.quantize` returns them.

    Raises:
        NumericsError: As :func:`factorize` and :func:`gptq_factored` do.
    """
    factor = factorize(hessian, act_order=act_order, damping=damping, layer=layer)
    return gptq_factored(weight, factor, operand, scales=scales, block=block, layer=layer)


def gptq_factored(
    weight: Tensor,
    factor: GptqFactor,
    operand: Operand,
    *,
    scales: tuple[Tensor, ...] | None = None,
    block: int = 128,
    layer: str = "",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Do the same as :func:`gptq` with a Hessian that has been factorized before.

    Raises:
        NumericsError: If the weight is no matrix of K columns, holds NaN, infinity, or fp64 values
            that fp32 cannot hold, ``block`` is not positive, or the scales do not fit the operand
            or are not positive numbers.
    """
    _require_fit(weight, factor, block, layer)
    computed = quantize(weight, operand, layer=layer)[1]
    scales = computed if scales is None else scales
    _require_scales(scales, computed, operand, layer)
    total = _expanded(scales, operand, weight, layer)
    spec, plain = operand.format, weight.detach().float()
    nearest = encode(plain / total, spec)
    codes = encode(_visit(weight.detach(), total, factor, spec, block).T, spec)
    errors = [
        output_error(weight, decode(c, spec).mul_(total), factor.hessian) for c in (codes, nearest)
    ]
    better = errors[0] <= errors[1]
    return torch.where(better[:, None], codes, nearest), scales


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """Return the squared error of each output: ``d H d^T`` for each row ``d`` of the difference.

    It is the sum over tokens of the squared error, or the mean, as the Hessian is the sum or mean.

    Args:
        weight: ``[N, K]``.
        quantized: The values that replace it, ``[N, K]``.
        hessian: ``X^T X``, ``[K, K]``.

    Returns:
        fp64 ``[N]``.

    Raises:
        NumericsError: If the shapes do not fit.
    """
    if weight.shape != quantized.shape or hessian.shape != (weight.shape[-1],) * 2:
        raise NumericsError(
            f"a weight {list(weight.shape)}, its replacement {list(quantized.shape)} and a Hessian "
            f"{list(hessian.shape)} do not fit: [N, K], [N, K] and [K, K] are needed."
        )
    wide = hessian.detach().double()
    errors = torch.empty(weight.shape[0], dtype=torch.float64, device=weight.device)
    for part in chunks(weight.shape[0], weight.shape[1], weight.device):
        difference = quantized[part].detach().double() - weight[part].detach().double()
        errors[part] = (difference @ wide).mul_(difference).sum(-1)
    return errors


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Return upper triangular ``U``, ``U^T U = (H + damping I)^-1``, or None if it has none.

    With rows and columns reversed, a Cholesky factor ``L`` of ``H`` becomes upper triangular
    ``R``, ``H = R R^T``; its inverse is ``U``. That takes one factorization, and rounds less than
    factorizing an inverse.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info):
        return None
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1).contiguous() if bool(inverse.isfinite().all()) else None


def _visit(
    weight: Tensor, total: Tensor, factor: GptqFactor, spec: FloatSpec, block: int
) -> Tensor:
    """Return what each value is before it is rounded, in units of its scale: fp32 ``[K, N]``."""
    rows, k = weight.shape
    left = weight.T[factor.order].double()
    quotients = torch.empty(k, rows, dtype=torch.float32, device=weight.device)
    scratch = Scratch(weight.device)
    for start in range(0, k, block):
        columns = factor.order[start : start + block]
        stop = start + len(columns)
        errors = left[start:stop]
        square = factor.upper[start:stop, start:stop]
        quotients[columns] = _visit_block(errors, total.T[columns], square, spec, scratch)
        left[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
    return quotients


def _visit_block(
    values: Tensor, total: Tensor, upper: Tensor, spec: FloatSpec, scratch: Scratch
) -> Tensor:
    """Visit the columns of one block, and replace each by the error that it leaves.

    Args:
        values: The columns as they are now, fp64 ``[B, N]``; overwritten with ``e``.
        total: Their scales, fp32 ``[B, N]``.
        upper: ``U`` among them, fp64 ``[B, B]``.
        spec: The format.
        scratch: Working memory.

    Returns:
        The columns before they were rounded, divided by their scales: fp32 ``[B, N]``.
    """
    quotients = torch.empty_like(total)
    rounded = torch.empty_like(total[0])
    weights = upper.T.contiguous()
    for j, value in enumerate(values):
        value.addmv_(values[:j].T, weights[j, :j], alpha=-1)
        torch.div(value.float(), total[j], out=quotients[j])
        round_into(rounded, quotients[j], spec, scratch)
        value.sub_(rounded.mul_(total[j])).div_(weights[j, j])
    return quotients


def _expanded(scales: tuple[Tensor, ...], operand: Operand, weight: Tensor, layer: str) -> Tensor:
    """Return the product of the scales of each value: fp32 ``[N, K]``."""
    if not scales:
        return torch.ones(1, dtype=torch.float32, device=weight.device).expand(weight.shape)
    total = expand_scale(scales, operand, weight.shape[1])
    if not bool(((total > 0) & total.isfinite()).all()):
        raise NumericsError(
            f"{describe_layer(layer)}: a scale is not a positive number. The scale of a group of "
            "zeros is 1."
        )
    return total.expand(weight.shape)


def _require_scales(
    scales: tuple[Tensor, ...], computed: tuple[Tensor, ...], operand: Operand, layer: str
) -> None:
    given, wanted = ([f"{s.dtype} {list(s.shape)}" for s in group] for group in (scales, computed))
    if given != wanted:
        raise NumericsError(
            f"{describe_layer(layer)}: {operand} needs the scales {wanted} here, not {given}; they "
            "have the form that quantize returns."
        )


def _require_hessian(hessian: Tensor, damping: float, layer: str) -> None:
    square = hessian.ndim == 2 and hessian.shape[0] == hessian.shape[1]
    if not square or not hessian.is_floating_point():
        raise NumericsError(
            f"{describe_layer(layer)}: a Hessian is floating-point [K, K], "
            f"not {hessian.dtype} {list(hessian.shape)}."
        )
    if not bool(hessian.isfinite().all()) or bool((hessian.diagonal() < 0).any()):
        raise NumericsError(
            f"{describe_layer(layer)}: the Hessian of its input holds NaN/Inf or a negative "
            "diagonal. Check the calibration inputs, and sum X^T X in fp32 or fp64."
        )
    if not 0 <= damping <= MOST_DAMPING:
        raise NumericsError(
            f"{describe_layer(layer)}: a damping of {damping} is not between 0 and "
            f"{MOST_DAMPING:g} times the mean diagonal."
        )


def _require_fit(weight: Tensor, factor: GptqFactor, block: int, layer: str) -> None:
    if weight.ndim != 2 or weight.shape[1] != len(factor.order):
        raise NumericsError(
            f"{describe_layer(layer)}: a weight {list(weight.shape)} does not fit a Hessian "
            f"{list(factor.hessian.shape)}: [N, K] and [K, K] are needed."
        )
    if weight.device != factor.order.device:
        raise NumericsError(
            f"{describe_layer(layer)}: the weight is on {weight.device} and the Hessian on "
            f"{factor.order.device}; move one."
        )
    if block < 1:
        raise NumericsError(f"{describe_layer(layer)}: a block of {block} columns is not possible.")
