"""The rectified sigmoid, and what drives it to 0 or 1 (AdaRound, Nagel et al., arXiv 2004.10568).

``h(a) = clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1)`` (eq. 23) is how far a value is rounded up.
The regularizer ``1 - |2 h - 1|**beta`` (eq. 24) is 0 where that is decided; with a large ``beta``
it is flat but near 0 and 1, and with 2 it acts on every value.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

ZETA: Final = 1.1
GAMMA: Final = -0.1
"""By how much the sigmoid is stretched beyond 1 and 0, so that both are reached."""

FIRST_BETA: Final = 20.0
LAST_BETA: Final = 2.0
WARM_UP: Final = 0.2
"""The part of the iterations in which the regularizer is off."""

_RANGE: Final = ZETA - GAMMA


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """Return ``h(alpha)``, from 0 to 1."""
    return alpha.sigmoid().mul(_RANGE).add(GAMMA).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """Return ``alpha`` with ``h(alpha) = h``, for ``h`` from 0 to 1."""
    return -torch.log(_RANGE / (h - GAMMA) - 1.0)


def rectified_slope(alpha: Tensor) -> Tensor:
    """Return the derivative of ``h``: ``(zeta - gamma) sigma (1 - sigma)``, 0 where it is clipped.

    The ends of the clip are within, so that a value that begins on the grid can leave it.
    """
    sigma = alpha.sigmoid()
    stretched = sigma * _RANGE + GAMMA
    inside = (stretched >= 0.0) & (stretched <= 1.0)
    return sigma.addcmul_(sigma, sigma, value=-1.0).mul_(_RANGE).mul_(inside)


def undecided(h: Tensor, beta: float) -> Tensor:
    """Return ``1 - |2 h - 1|**beta`` of each value."""
    return 1.0 - (2.0 * h - 1.0).abs().pow(beta)


def undecided_slope(h: Tensor, beta: float) -> Tensor:
    """Return the derivative of :func:`undecided`: ``-2 beta sign(2 h - 1) |2 h - 1|**(beta-1)``."""
    signed = 2.0 * h - 1.0
    return signed.abs().pow_(beta - 1.0).copysign_(signed).mul_(-2.0 * beta)


def beta_at(progress: float) -> float | None:
    """Return ``beta`` at a part of the iterations, 0 to 1; None where the regularizer is off.

    It falls linearly from 20 at the end of the warm-up to 2 at the end.
    """
    if progress < WARM_UP:
        return None
    left = min(1.0, (1.0 - progress) / (1.0 - WARM_UP))
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * max(0.0, left)
