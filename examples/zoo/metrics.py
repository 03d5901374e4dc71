"""How good a model still is: the metrics of the models of the zoo.

A metric takes callables and tensors, so that the eager model, a compiled one and one loaded from an
artifact are measured by the same code. Most are those of :mod:`fpcompiler.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpcompiler.evaluation import (
    mean_cosine,
    pearson,
    perplexity,
    token_losses,
    transcribe_greedy,
    word_errors,
)
from fpcompiler.evaluation import mean_pooled as sentence_vectors

__all__ = [
    "token_losses", "perplexity", "generate_greedy", "sentence_vectors", "transcribe_greedy",
    "similarity_pearson", "mean_cosine", "mean_absolute_error", "word_errors",
    "Forward", "Encode", "Decode",
]  # fmt: skip

Forward = Callable[[Tensor], Tensor]
"""Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""
Encode = Callable[[Tensor, Tensor], Tensor]
"""Token ids and mask [batch, tokens] to hidden states [batch, tokens, width]."""
Decode = Callable[[Tensor, Tensor], Tensor]
"""Token ids [batch, tokens] and encoder states to logits [batch, tokens, vocabulary]."""


@torch.no_grad()
def generate_greedy(forward: Forward, ids: Tensor, count: int) -> Tensor:
    """Return ``ids`` [tokens] followed by ``count`` tokens, always the likeliest."""
    for _ in range(count):
        token = forward(ids[None])[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
    return ids


def similarity_pearson(embeddings: Tensor, ratings: Tensor) -> float:
    """Return how the cosines of unit vectors [texts, width] follow human ratings [texts, texts]."""
    first, second = torch.triu_indices(len(ratings), len(ratings), offset=1)
    cosines = embeddings.double() @ embeddings.double().T
    return pearson(cosines[first, second], ratings[first, second])


def mean_absolute_error(reference: Tensor, value: Tensor) -> float:
    """Return the mean distance of two tensors, for instance of maps of saliency from 0 to 1."""
    return float((reference.double() - value.double()).abs().mean())
