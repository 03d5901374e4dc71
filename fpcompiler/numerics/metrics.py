"""How close two tensors are. Sums are in fp64, and every pair of tensors of a shape has a value."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics.scratch import chunks


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB.

    ``10 log10(sum(reference**2) / sum((reference - value)**2))``: infinite if the tensors are
    equal, otherwise minus infinity if the reference is zero, and NaN if either holds NaN.

    Raises:
        NumericsError: If the shapes differ.
    """
    signal = noise = 0.0
    for a, b in _pairs(reference, value):
        signal += float(a.square().sum())
        noise += float(_difference(a, b).square().sum())
    if noise == 0.0:
        return math.inf
    ratio = signal / noise
    return 10.0 * math.log10(ratio) if ratio else -math.inf


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two tensors: 1 if both are zero, 0 if only one is.

    Raises:
        NumericsError: If the shapes differ.
    """
    dot = square_a = square_b = 0.0
    for x, y in _pairs(a, b):
        dot += float(x @ y)
        square_a += float(x @ x)
        square_b += float(y @ y)
    if square_a == 0.0 or square_b == 0.0:
        return float(square_a == square_b)
    return dot / (math.sqrt(square_a) * math.sqrt(square_b))


def max_error(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; 0 if the tensors are empty, NaN if one holds NaN.

    Raises:
        NumericsError: If the shapes differ.
    """
    errors = [float(_difference(x, y).abs().max()) for x, y in _pairs(a, b)]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b``, where equal infinities differ by 0."""
    return (a - b).masked_fill_(a == b, 0.0)


def _pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the values of both tensors in fp64, a chunk at a time."""
    if a.shape != b.shape:
        raise NumericsError(f"cannot compare shapes {list(a.shape)} and {list(b.shape)}.")
    flat_a, flat_b = a.detach().reshape(-1), b.detach().reshape(-1)
    for part in chunks(flat_a.numel(), 1, flat_a.device):
        yield flat_a[part].to(torch.float64), flat_b[part].to(torch.float64)
