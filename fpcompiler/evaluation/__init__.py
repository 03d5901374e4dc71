"""How good a model still is: tasks that run on any callable and compare two models.

A task is a frozen dataclass that holds its data. ``task.run(model)`` returns a :class:`Result`, and
:func:`recoveries` puts the results of a compiled model beside those of the original::

    task = Perplexity(token_ids)
    rows = recoveries(task.run(model), task.run(compiled))

Tasks that have no score of their own, only a distance to the original, need
``task.against(model)`` first. ``fpcompiler eval`` does all of it on the command line.
"""

from __future__ import annotations

from fpcompiler.evaluation.agreement import Agreement, FeatureAgreement, mean_cosine
from fpcompiler.evaluation.base import Direction, Model, Recovery, Result, Task, Track, recoveries
from fpcompiler.evaluation.choices import Item, MultipleChoice, choice_log_likelihoods
from fpcompiler.evaluation.perplexity import Perplexity, perplexity, token_losses
from fpcompiler.evaluation.similarity import Similarity, mean_pooled, pearson, spearman
from fpcompiler.evaluation.transcription import (
    Transcription,
    normalized_words,
    transcribe_greedy,
    word_errors,
)

__all__ = [
    "Task", "Result", "Direction", "Recovery", "recoveries", "Model", "Track",
    "Perplexity", "perplexity", "token_losses",
    "MultipleChoice", "Item", "choice_log_likelihoods",
    "Similarity", "mean_pooled", "pearson", "spearman",
    "Agreement", "FeatureAgreement", "mean_cosine",
    "Transcription", "normalized_words", "transcribe_greedy", "word_errors",
]  # fmt: skip
