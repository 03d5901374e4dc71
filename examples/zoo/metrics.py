"""How good a model still is: one metric for each model of the zoo.

A metric takes callables and tensors, so that the eager model, a compiled one and one loaded from an
artifact are measured by the same code.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}

Forward = Callable[[Tensor], Tensor]
"""Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""
Encode = Callable[[Tensor, Tensor], Tensor]
"""Token ids and mask [batch, tokens] to hidden states [batch, tokens, width]."""
Decode = Callable[[Tensor, Tensor], Tensor]
"""Token ids [batch, tokens] and encoder states to logits [batch, tokens, vocabulary]."""


@torch.no_grad()
def token_losses(forward: Forward, ids: Tensor, context: int = 512) -> Tensor:
    """Return the negative log-likelihood of each predicted token of ``ids`` [tokens], in fp64.

    The text is cut into windows of ``context`` tokens that do not overlap, each seen alone; the
    first token of a window is not predicted.
    """
    windows = [window for window in ids.split(context) if len(window) > 1]
    losses = []
    for window in windows:
        logits = forward(window[None])[0, :-1]
        losses.append(nnf.cross_entropy(logits.double(), window[1:], reduction="none"))
    return torch.cat(losses)


def perplexity(forward: Forward, ids: Tensor, context: int = 512) -> float:
    """Return exp of the mean of :func:`token_losses`."""
    return float(token_losses(forward, ids, context).mean().exp())


@torch.no_grad()
def generate_greedy(forward: Forward, ids: Tensor, count: int) -> Tensor:
    """Return ``ids`` [tokens] followed by ``count`` tokens, always the likeliest."""
    for _ in range(count):
        token = forward(ids[None])[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
    return ids


@torch.no_grad()
def sentence_vectors(encode: Encode, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean hidden state of each text's tokens as a unit vector [texts, width].

    Args:
        encode: Gives the hidden states [texts, tokens, width] of ids and mask.
        ids: Token ids [texts, tokens].
        mask: 1 for tokens, 0 for padding [texts, tokens].
    """
    hidden = encode(ids, mask) * mask[..., None]
    return nnf.normalize(hidden.sum(1) / mask.sum(1, keepdim=True))


@torch.no_grad()
def transcribe_greedy(
    decode: Decode, states: Tensor, start: Tensor, end: int, special: Tensor, longest: int = 64
) -> Tensor:
    """Return ``start`` [tokens] followed by the likeliest tokens for the encoder states.

    Args:
        decode: Gives logits [1, tokens, vocabulary] for ids [1, tokens] and states.
        states: What the encoder heard [1, frames, width].
        start: The first tokens.
        end: The token that ends the text; it is not part of the result.
        special: Tokens that are never taken.
        longest: Tokens of the result at most.
    """
    ids = start
    while len(ids) < longest:
        logits = decode(ids[None], states)[0, -1].clone()
        logits[special] = -torch.inf
        token = logits.argmax()
        if token == end:
            break
        ids = torch.cat([ids, token[None]])
    return ids


def pearson(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two sets of numbers, from -1 to 1."""
    a, b = (x.flatten().double() for x in (a, b))
    return mean_cosine((a - a.mean())[None], (b - b.mean())[None])


def similarity_pearson(embeddings: Tensor, ratings: Tensor) -> float:
    """Return how the cosines of unit vectors [texts, width] follow human ratings [texts, texts]."""
    first, second = torch.triu_indices(len(ratings), len(ratings), offset=1)
    cosines = embeddings.double() @ embeddings.double().T
    return pearson(cosines[first, second], ratings[first, second])


def mean_cosine(reference: Tensor, value: Tensor) -> float:
    """Return the mean cosine of vectors [..., width], for instance of the tokens of patches."""
    return float(nnf.cosine_similarity(reference.double(), value.double(), dim=-1).mean())


def mean_absolute_error(reference: Tensor, value: Tensor) -> float:
    """Return the mean distance of two tensors, for instance of maps of saliency from 0 to 1."""
    return float((reference.double() - value.double()).abs().mean())


def word_errors(reference: str, text: str) -> tuple[int, int]:
    """Return the least words to insert, delete or replace, and the words of the reference.

    Case, punctuation and hyphens do not count, and a title may be short: "Mr." is "mister".
    """
    wanted, found = _words(reference), _words(text)
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
            diagonal, row[j] = row[j], cost
    return row[-1], len(wanted)


def _words(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return [_TITLES.get(word, word) for word in words]
