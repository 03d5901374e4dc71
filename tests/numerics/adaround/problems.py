"""Small problems that tests of learned rounding share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fpcompiler.numerics import quantize
from fpcompiler.numerics.adaround import SoftWeight
from fpcompiler.operand import Operand
from tests.models import normal


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Return tokens whose channels are correlated and differ in size, as in a trained model."""
    mixing = normal(k // 4, k, seed=100) / (k // 4) ** 0.5
    sizes = torch.exp(0.5 * normal(k, seed=101))
    return (
        normal(tokens, k // 4, seed=seed) @ mixing + 0.3 * normal(tokens, k, seed=seed + 1)
    ) * sizes


@dataclass(frozen=True)
class Data:
    """Samples in memory."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        chosen = list(indices)
        return (self.inputs[chosen],), self.targets[chosen]


def linear(weights: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0] @ weights[0].T


def mlp(weights: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    (x,) = inputs
    hidden = functional.gelu(functional.linear(functional.layer_norm(x, x.shape[-1:]), weights[0]))
    return x + functional.linear(hidden, weights[1])


def soften(weight: Tensor, text: str) -> SoftWeight:
    """Return the neighbours of a weight with the scales of round-to-nearest."""
    operand = Operand.parse(text)
    return SoftWeight.of(weight, quantize(weight, operand)[1], operand)
