"""Columns of a quantized weight times powers of two, exactly: in its codes, or in its block scales.

This is how the powers of LLM-FP4's pre-shifted biases (see :mod:`.preshift`) get into a weight that
is rounded already. Either a wider format holds the codes, and its number of exponent bits decides
how large a power may be; or all columns of a block have one power, and the scale of the block takes
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.shift_lowering import Container
from fpcompiler.operand import Operand, ScaleLevel

_EXPONENT_SCALE = "f8E8M0FNU"
_LARGEST_CODE = 254
"""Of E8M0; 255 is NaN."""


def divide_columns(
    codes: Tensor,
    scales: tuple[Tensor, ...],
    powers: Tensor,
    operands: tuple[Operand, Operand],
    *,
    shift: int = 0,
    layer: str = "",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a quantized weight with column ``j`` divided by ``powers[j]``, exactly.

    Args:
        codes: uint8 ``[N, K]``, one code a byte.
        scales: Of each level.
        powers: ``2**k_j``, ``[K]``, any floating-point dtype; ``k_j`` from 0 to 31.
        operands: What the codes are, and what they become: of equal levels. With equal formats the
            block scales take the powers, otherwise the codes do.
        shift: Codes are held as ``2**shift`` times their size, see :class:`Container`; the first
            level makes up for it.
        layer: Named in errors.

    Returns:
        Codes and scales of the second operand.

    Raises:
        NumericsError: If it cannot be exact.
    """
    source, target = operands
    exponents = _exponents(powers, codes.shape[-1], layer)
    if source.format is target.format:
        blocks = _of_blocks(exponents, source, layer)
        return codes, (*scales[:-1], _scaled(scales[-1], source.levels[-1], -blocks, layer))
    held = Container(source.format, target.format, shift, int(exponents.max()))
    first = torch.full((), -shift, dtype=torch.int32, device=codes.device)
    outer = _scaled(scales[0], source.levels[0], first, layer)
    return held.fold(codes, exponents), (outer, *scales[1:])


def takes_powers(operand: Operand) -> bool:
    """Return whether the block scales of an operand can be multiplied by powers of two exactly."""
    return operand.block is not None and (
        operand.block.is_real or operand.block.format == _EXPONENT_SCALE
    )


def _exponents(powers: Tensor, k: int, layer: str) -> Tensor:
    """Return ``k_j``, int32."""
    exponents = torch.frexp(powers.float()).exponent.to(torch.int32) - 1
    if powers.shape != (k,) or not torch.equal(exact_power(exponents), powers.float()):
        raise NumericsError(
            f"{describe_layer(layer)}: {k} columns can be divided by as many powers of two, not by "
            f"{list(powers.shape)} other numbers."
        )
    return exponents


def _of_blocks(exponents: Tensor, operand: Operand, layer: str) -> Tensor:
    """Return the one exponent of each block, ``[blocks]``."""
    block = operand.block
    size = block.block if block else len(exponents)
    first = exponents[::size]
    if block is None or not torch.equal(first.repeat_interleave(size)[: len(exponents)], exponents):
        raise NumericsError(
            f"{describe_layer(layer)}: the scales of {operand} take powers of two only where all "
            "columns of a block have the same one. Permute the columns, or choose a wider format."
        )
    return first


def _scaled(scale: Tensor, level: ScaleLevel, exponents: Tensor, layer: str) -> Tensor:
    """Return scales of a level times ``2**exponents``."""
    if level.is_real:
        scaled = scale * exact_power(exponents)
        exact = bool(((scaled * exact_power(-exponents) == scale) & scaled.isfinite()).all())
    elif level.format == _EXPONENT_SCALE:
        wide = scale.to(torch.int32) + exponents
        exact = bool(((wide >= 0) & (wide <= _LARGEST_CODE)).all())
        scaled = wide.to(torch.uint8)
    else:
        scaled, exact = scale, not bool(exponents.any())
    if not exact:
        raise NumericsError(
            f"{describe_layer(layer)}: a scale {level} times 2**{int(exponents.min())} has no "
            "exact value. Lower the limit of the exponents, or divide before rounding."
        )
    return scaled
