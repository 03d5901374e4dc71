"""What a search found, in the form that quantization takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.search.problem import Choice


@dataclass(frozen=True)
class SearchResult:
    """Formats and scales of one layer, and what they and others cost.

    Losses are the mean over tokens and outputs of the (Fisher-weighted) squared output error.

    Attributes:
        weight: Format and scales, fp32 ``[N, 1]``, of the weight.
        activation: Format and scale, fp32 ``[1, 1]``, of the inputs; None if they stay as they are.
        loss: The loss of these.
        rtn: For each pair of names of formats, weight first and ``""`` for inputs that stay as they
            are, the loss without any clip.
        by_weight: For each weight format the loss of its best clips, with the inputs as they were
            when it was last searched (on a sample of tokens where that is what was searched on).
        by_activation: The same for each format of the inputs.
        rounds: How many rounds were made.
    """

    weight: Choice
    activation: Choice | None
    loss: float
    rtn: Mapping[tuple[str, str], float]
    by_weight: Mapping[str, float]
    by_activation: Mapping[str, float]
    rounds: int

    def __post_init__(self) -> None:
        """Make the tables read-only."""
        for name in ("rtn", "by_weight", "by_activation"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def rtn_loss(self) -> float:
        """The loss of the best pair of formats without any clip."""
        return min(self.rtn.values())

    @property
    def weight_clip(self) -> Tensor:
        """The largest number of each row of the quantized weight, fp32 ``[N]``."""
        return self.weight.scale[:, 0] * self.weight.spec.max

    @property
    def activation_clip(self) -> Tensor | None:
        """The largest number of the quantized inputs, fp32 of no axes."""
        if self.activation is None:
            return None
        return self.activation.scale.view(()) * self.activation.spec.max


def pair_table(
    weights: tuple[FloatSpec, ...],
    activations: tuple[FloatSpec, ...],
    losses: Tensor,
) -> dict[tuple[str, str], float]:
    """Return losses ``[activations or 1, weights]`` by the names of their formats."""
    names = [spec.name for spec in activations] or [""]
    rows = losses.to(torch.float64).tolist()
    return {
        (weight.name, name): row[j]
        for name, row in zip(names, rows, strict=True)
        for j, weight in enumerate(weights)
    }
