"""Sentence similarity: do the embeddings of texts agree with what people say about them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation.base import Direction, Model, Program, Result, Task, Track, without_bar
from fpcompiler.evaluation.calls import NAN_HINT, call, device_of, one_program, select_output

__all__ = ["Similarity", "mean_pooled", "pearson", "spearman"]

Embed: TypeAlias = Callable[[Program, Tensor, Tensor], Tensor]
"""Unit vectors [texts, width] of a program, token ids and mask [texts, tokens]."""


def mean_pooled(program: Program, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean hidden state of each text's tokens as a unit vector [texts, width].

    Args:
        program: Called with ids and mask; gives hidden states [texts, tokens, width], or vectors
            [texts, width] that are pooled already.
        ids: Token ids [texts, tokens].
        mask: 1 for tokens, 0 for padding [texts, tokens].

    Raises:
        OptionError: If the program gives something else.
        RunError: If it fails.
    """
    hidden = select_output(call(program, ids, mask))
    if hidden.ndim == 2:
        return nnf.normalize(hidden)
    if hidden.shape[:2] != ids.shape:
        raise OptionError(
            f"the model gives {list(hidden.shape)} for texts {list(ids.shape)}, but an encoder "
            "gives [texts, tokens, width] or [texts, width]."
        )
    hidden = hidden * mask[..., None]
    return nnf.normalize(hidden.sum(1) / mask.sum(1, keepdim=True))


@final
@dataclass(frozen=True, eq=False)
class Similarity(Task):
    """Correlation of the cosines of text pairs with scores given by people.

    Attributes:
        batches: Token ids and masks [texts, tokens], in the order of the texts.
        pairs: The numbers of the two texts of each pair [pairs, 2].
        scores: The score of each pair [pairs].
        embed: How a text becomes a vector.
    """

    name: ClassVar[str] = "similarity"
    metric: ClassVar[str] = "pearson"
    direction: ClassVar[Direction] = Direction.HIGHER
    batches: Sequence[tuple[Tensor, Tensor]]
    pairs: Tensor
    scores: Tensor
    embed: Embed = mean_pooled

    def run(self, model: Model, progress: Track = without_bar) -> Result:
        """Return the correlations of values and of ranks, and how many pairs there are."""
        self._check()
        program = one_program(model)
        device = device_of(program)
        vectors = torch.cat([
            self.embed(program, ids.to(device=device), mask.to(device=device))
            for ids, mask in progress(self.batches, len(self.batches), "batches of texts")
        ]).double()  # fmt: skip
        _check_finite(vectors)
        first, second = self.pairs.to(vectors.device).unbind(1)
        cosines = (vectors[first] * vectors[second]).sum(1)
        scores = self.scores.to(vectors.device)
        metrics = {
            self.metric: pearson(cosines, scores),
            "spearman": spearman(cosines, scores),
        }
        return Result(metrics, self.direction, len(self.scores), "pairs")

    def _check(self) -> None:
        texts = sum(len(ids) for ids, _ in self.batches)
        if self.pairs.shape != (len(self.scores), 2) or len(self.scores) < 2:
            raise OptionError(
                f"a correlation needs two pairs or more, and a score for each: there are pairs "
                f"{list(self.pairs.shape)} and scores {list(self.scores.shape)}."
            )
        if not 0 <= int(self.pairs.min()) <= int(self.pairs.max()) < texts:
            raise OptionError(f"a pair names a text that is not among the {texts} texts.")


def pearson(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two sets of numbers, from -1 to 1; 0 if one set is constant."""
    a, b = (x.flatten().double() for x in (a, b))
    return float(nnf.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the correlation of the ranks of two sets of numbers; equal numbers share a rank."""
    return pearson(_ranks(a.flatten()), _ranks(b.flatten()))


def _ranks(values: Tensor) -> Tensor:
    inverse: Tensor
    counts: Tensor
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def _check_finite(vectors: Tensor) -> None:
    bad = (~vectors.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise NumericsError(
            f"the embedding of text {int(bad[0])} (counted from 0) is NaN or infinite, and that of "
            f"{len(bad)} of {len(vectors)} texts in all. {NAN_HINT}"
        )
