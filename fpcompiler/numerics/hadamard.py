"""The block Hadamard transform: it spreads an outlier over a block, so that no value is large.

``(x S H)(w S H)^T = x w^T`` for the orthonormal Hadamard matrix ``H`` and signs ``S``: an input and
a weight that are transformed alike give the same output (QuaRot, arXiv 2404.00456; in blocks,
MR-GPTQ, arXiv 2509.23202). The signs must come before ``H``. After it they would change nothing,
because formats are symmetric: a quantized value only changes its sign.

One product with ``H`` takes 6 to 15 ms for 4M values on one core, butterflies 15 to 35 ms. Its last
bits depend on the routine that the machine has for products.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer

HADAMARD_BLOCKS: Final = (16, 32, 64, 128)
"""Lengths that a transformed block may have."""


def hadamard(x: Tensor, block: int, *, signs: Tensor | None = None, layer: str = "") -> Tensor:
    """Return ``x S H``, the transform of each block of the last axis.

    ``H`` is the Hadamard matrix in Sylvester's order, divided by ``sqrt(block)``: symmetric and
    orthogonal, so that without signs the transform is its own inverse, up to rounding.

    Args:
        x: ``[..., K]``, any floating-point dtype.
        block: Values in a block, one of :data:`HADAMARD_BLOCKS`; K is a multiple of it.
        signs: +1 or -1 for each channel, ``[K]``; see :func:`random_signs`.
        layer: Named in errors.

    Returns:
        The dtype and shape of ``x``; the arithmetic is fp32, and fp64 for fp64. How CUDA multiplies
        fp32 (TF32 or not) is a setting of PyTorch; by default it is fp32.

    Raises:
        NumericsError: If ``x`` is not floating-point, the block is another length, or K is no
            multiple of it or does not fit the signs.
    """
    _require_blocks(x, block, signs, layer)
    wide = _working(x)
    if signs is not None:
        wide = wide * signs.to(wide)
    return transform(wide, _matrix(block, wide.dtype, x.device)).to(x.dtype)


def transform(x: Tensor, matrix: Tensor) -> Tensor:
    """Return the product of each block of the last axis with a matrix, as long as a block."""
    return (x.reshape(-1, len(matrix)) @ matrix).view(x.shape)


def inverse_hadamard(y: Tensor, block: int, *, signs: Tensor, layer: str = "") -> Tensor:
    """Undo :func:`hadamard` with signs, up to rounding: ``y H S``.

    Args:
        y: What :func:`hadamard` returned, ``[..., K]``.
        block: As for :func:`hadamard`.
        signs: As for :func:`hadamard`.
        layer: Named in errors.

    Returns:
        The dtype and shape of ``y``.

    Raises:
        NumericsError: As :func:`hadamard` does.
    """
    _require_blocks(y, block, signs, layer)
    return (hadamard(_working(y), block, layer=layer) * signs.to(y.device)).to(y.dtype)


def random_signs(k: int, seed: int) -> Tensor:
    """Return +1 and -1 at random, fp32 ``[k]`` on the CPU: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (k,), generator=generator).mul_(2).sub_(1).float()


@lru_cache(maxsize=32)
def _matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return sylvester(block).to(device, dtype)


def sylvester(block: int) -> Tensor:
    """Return Sylvester's matrix, divided by the root of its size: fp64 ``[block, block]``."""
    half = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(half, matrix)
    return matrix / math.sqrt(block)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _require_blocks(x: Tensor, block: int, signs: Tensor | None, layer: str) -> None:
    if block not in HADAMARD_BLOCKS:
        sizes = ", ".join(map(str, HADAMARD_BLOCKS))
        raise NumericsError(
            f"{describe_layer(layer)}: a Hadamard block of {block} values is not possible; "
            f"sizes: {sizes}."
        )
    if not x.is_floating_point() or not x.ndim:
        raise NumericsError(
            f"{describe_layer(layer)}: only floating-point tensors with at least one axis can be "
            f"transformed, not {x.dtype} {list(x.shape)}."
        )
    k = x.shape[-1]
    if k % block:
        fitting = [size for size in HADAMARD_BLOCKS if k % size == 0]
        advice = f"use a block of {fitting[-1]}" if fitting else "do not rotate this layer"
        raise NumericsError(
            f"{describe_layer(layer)}: {k} input channels are no multiple of the Hadamard block "
            f"of {block}; {advice}."
        )
    if signs is not None and signs.shape != (k,):
        raise NumericsError(
            f"{describe_layer(layer)}: {k} input channels need as many signs, "
            f"not {list(signs.shape)}."
        )
