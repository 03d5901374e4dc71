"""The scale of each block, chosen by the error that it makes.

Rounding ``amax / max`` to the scale's format is a rule that sees the largest value only. Here the
neighbours of what an operand's own rule gives are tried too, and for E4M3 scales the one that maps
the largest value to the second largest number: 4 instead of 6 in E2M1 (Four Over Six, arXiv
2512.02010).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.blocks import Blocks
from fpcompiler.numerics.given import quantize_with
from fpcompiler.numerics.rounding import decode, encode, round_into
from fpcompiler.numerics.scales import Quotient
from fpcompiler.numerics.scaling import quantize
from fpcompiler.numerics.scratch import Scratch
from fpcompiler.operand import Operand

_STEPS = (-1, 1, -2, 2)
"""What is tried: so many codes from the operand's own scale."""


def search_block_scales(
    weight: Tensor, operand: Operand, importance: Tensor | None = None, *, layer: str = ""
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Quantize with the scale of each block that makes its squared error least.

    The scales of the outer level stay those of :func:`fpcompiler.numerics.quantize`. The error of
    a block is never more than with the scale that the operand's own rounding gives.

    Args:
        weight: ``[N, K]``, any floating-point dtype.
        operand: Has blocks with an E8M0 or E4M3 scale.
        importance: ``[K]``, the weight of the squared error of each input channel, such as the
            diagonal of ``x.T @ x``; by default 1.
        layer: Named in errors.

    Returns:
        Codes and scales in the form of :func:`fpcompiler.numerics.quantize`.

    Raises:
        NumericsError: If the operand has no such blocks, shapes do not fit, importance is negative
            or not finite, or the weight holds NaN or infinity.
    """
    _check(weight, operand, importance, layer)
    codes, scales = quantize(weight, operand, layer=layer)
    assert operand.block is not None
    assert operand.block.spec is not None
    if not weight.numel():
        return codes, scales
    blocks = Blocks(weight.detach(), operand.block.block, Scratch(weight.device))
    errors = _Errors(blocks, operand.format, _per_block(blocks, importance))
    outer = scales[0].view(-1, 1, 1) if operand.outer else None
    best = _best(errors, scales[-1][..., None], outer, operand)[..., 0]
    scales = (*scales[:-1], best.contiguous())
    return quantize_with(weight, scales, operand, layer=layer), scales


def _best(errors: _Errors, own: Tensor, outer: Tensor | None, operand: Operand) -> Tensor:
    """Return the codes of the scales with the least errors, uint8 ``[R, blocks, 1]``."""
    assert operand.block is not None
    assert operand.block.spec is not None
    spec, bits = operand.block.spec, errors.blocks.largest()
    factor = own.new_ones((), dtype=torch.float32) if outer is None else outer
    best, least = own, errors.of(decode(own, spec) * factor)
    for candidate in _candidates(own, bits.view(torch.float32) / factor, operand):
        # A product of scales stays a normal number, and blocks of zeros keep the scale 1, as
        # numerics.scaling has it.
        total = decode(candidate, spec) * factor
        error = errors.of(total.clamp(min=2.0**-126))
        better = (error < least) & (total >= 2.0**-126) & total.isfinite() & (bits != 0)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


@dataclass(frozen=True)
class _Errors:
    """The error of each block for scales that are given."""

    blocks: Blocks
    element: FloatSpec
    importance: Tensor | None

    def of(self, total: Tensor) -> Tensor:
        """Return fp64 ``[R, blocks, 1]``; squares are taken in units of ``total``."""
        blocks, squares = self.blocks, self.blocks.new_sums()
        quotients = Quotient(total)
        for part in blocks.parts():
            value = blocks.load(part)
            y = blocks.scratch.take("y", value.shape, torch.float32)
            rounded = blocks.scratch.take("l", value.shape, torch.float32)
            quotients.into(y, value, part)
            round_into(rounded, y, self.element, blocks.scratch)
            rounded.sub_(y).square_()
            if self.importance is not None:
                rounded.mul_(self.importance)
            blocks.add_up(rounded, squares[part])
        return squares.mul_(total.double().square_())


def _candidates(own: Tensor, largest: Tensor, operand: Operand) -> list[Tensor]:
    """Return codes of scales to try beside the operand's own, uint8 like ``own``.

    Args:
        own: The codes of the operand's rule, uint8 ``[R, blocks, 1]``.
        largest: fp32, the largest magnitude of each block in units of the outer scale.
        operand: Element format and scale levels.
    """
    block = operand.block
    assert block is not None
    assert block.spec is not None
    spec, element = block.spec, operand.format
    first = 1 if spec.zero else 0
    found = [(own.int() + step).clamp_(first, spec.max_code).to(torch.uint8) for step in _STEPS]
    if spec.zero:
        second = largest / element.value(element.max_code - 1)
        found.append(encode(second.clamp_(spec.smallest, spec.max), spec))
    return found


def _per_block(blocks: Blocks, importance: Tensor | None) -> Tensor | None:
    """Return the importance as fp32 ``[blocks, width]``, at most 1, filled up with zeros."""
    if importance is None:
        return None
    wide = importance.detach().double()
    largest = wide.amax()
    relative = (wide / largest.where(largest > 0, 1.0)).float()
    padding = blocks.count * blocks.width - len(relative)
    return pad(relative, (0, padding)).view(blocks.count, blocks.width)


def _check(weight: Tensor, operand: Operand, importance: Tensor | None, layer: str) -> None:
    where = describe_layer(layer)
    if operand.block is None or operand.block.is_real:
        raise NumericsError(
            f"{where}: {operand} has no blocks whose scale is E8M0 or E4M3; search the clips of "
            "rows instead."
        )
    if weight.ndim != 2:
        raise NumericsError(f"{where}: a weight is [N, K], not {list(weight.shape)}.")
    if importance is None:
        return
    if importance.shape != weight.shape[1:] or importance.device != weight.device:
        raise NumericsError(
            f"{where}: the importance of {weight.shape[1]} channels has that length and the device "
            f"of the weight, not {list(importance.shape)} on {importance.device}."
        )
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise NumericsError(f"{where}: importance must be finite and not negative.")
