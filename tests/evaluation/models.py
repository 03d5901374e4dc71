"""Models so small that their results can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConstantLogits(nn.Module):
    """A language model that finds every token equally likely."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.zeros(*ids.shape, self.vocabulary)}


class Unigram(nn.Module):
    """A language model that gives each token the same probability after any other."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


class Table(nn.Module):
    """An encoder whose hidden state of a token is a row of a table, whatever stands around it."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (self.embedding(ids),)
