"""Powers of two as numbers, made from their bits: ``exp2`` and ``ldexp`` may round."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_power(exponent: Tensor) -> Tensor:
    """Return ``2**exponent`` exactly: fp32, for whole numbers from -126 to 127 of any dtype."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
