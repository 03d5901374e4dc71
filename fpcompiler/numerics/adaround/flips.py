"""Rounds single values the other way while that lowers the output error of a linear layer.

Learned roundings are near a minimum, but for some values the regularizer decides against the loss.
With the Gram matrix ``G`` of the inputs, the error of a row ``d`` is ``d G d^T``, and turning value
``j`` around by ``t`` changes it by ``2 t (d G)_j + t**2 G_jj``: all are known at once, and the best
one of each row is turned around until none is left that gains.
"""

from __future__ import annotations

import math
import time
from typing import Final

import torch
from torch import Tensor

_GAIN: Final = 1e-5
"""A gain below this part of a row's error may be rounding alone, and could be undone forever."""

_LOOKS: Final = 16
"""Flips between two looks at whether any row still gains: each look waits for the device."""


def flip(
    up: Tensor, difference: Tensor, width: Tensor, gram: Tensor, seconds: float | None = None
) -> Tensor:
    """Return which values are rounded up, at a minimum that no single flip lowers.

    Args:
        up: Which are now, bool ``[L, N, K]``.
        difference: The quantized weight minus the original, fp32 ``[L, N, K]``.
        width: From the lower to the upper neighbour, fp32 ``[L, N, K]``.
        gram: fp32 ``[L, K, K]``.
        seconds: About what it may take; None for no limit.

    Returns:
        bool ``[L, N, K]``. At most four flips for each column of a row are made.
    """
    up, difference = up.clone(), difference.clone()
    slope = difference @ gram
    diagonal = gram.diagonal(dim1=1, dim2=2)[:, None]
    end = math.inf if seconds is None else time.perf_counter() + seconds
    layer = torch.arange(len(gram), device=gram.device)[:, None]
    least = (slope * difference).sum(-1, keepdim=True).clamp_(min=0).mul_(-_GAIN)
    for count in range(4 * up.shape[-1]):
        turn = torch.where(up, -width, width)
        best, column = (slope * 2 + turn * diagonal).mul_(turn).min(-1, keepdim=True)
        gains = best < least
        if count % _LOOKS == 0 and (not bool(gains.any()) or time.perf_counter() > end):
            break
        step = turn.gather(-1, column) * gains
        slope.addcmul_(step, gram[layer, column[..., 0]])
        up.scatter_(-1, column, up.gather(-1, column) ^ gains)
    return up
