"""Multiple choice: which of some continuations a language model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation.base import Direction, Model, Program, Result, Task, Track, without_bar
from fpcompiler.evaluation.calls import NAN_HINT, device_of, language_logits, one_program

__all__ = ["MultipleChoice", "Item", "choice_log_likelihoods"]


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One question.

    Attributes:
        context: Token ids [tokens] of what comes before, at least one.
        choices: Token ids [tokens] of each continuation.
        answer: Index of the right one.

    Raises:
        OptionError: If there are fewer than two choices, the context or a choice is empty, or there
            is no such answer.
    """

    context: Tensor
    choices: tuple[Tensor, ...]
    answer: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not len(self.context):
            raise OptionError("an item needs a context of at least one token before its choices.")
        if len(self.choices) < 2 or not all(len(choice) for choice in self.choices):
            raise OptionError("an item needs at least two choices, and none without tokens.")
        if not 0 <= self.answer < len(self.choices):
            raise OptionError(
                f"an item with {len(self.choices)} choices has no answer {self.answer}; "
                "the first choice is 0."
            )


@final
@dataclass(frozen=True)
class MultipleChoice(Task):
    """Accuracy over items, where the model takes the continuation with the highest likelihood.

    ``accuracy`` compares log-likelihoods per token, so that long choices have no disadvantage;
    ``accuracy_by_sum`` compares their sums. Equal ones count for the first choice.

    Attributes:
        items: The questions.
    """

    name: ClassVar[str] = "choices"
    metric: ClassVar[str] = "accuracy"
    direction: ClassVar[Direction] = Direction.HIGHER
    items: Sequence[Item]

    def run(self, model: Model, progress: Track = without_bar) -> Result:
        """Return the accuracies, and how many items there are."""
        if not self.items:
            raise OptionError("there are no items to choose in.")
        program = one_program(model)
        sums = [
            choice_log_likelihoods(program, item)
            for item in progress(self.items, len(self.items), "items")
        ]
        _check_finite(sums)
        means = [
            total / total.new_tensor([len(choice) for choice in item.choices])
            for total, item in zip(sums, self.items, strict=True)
        ]
        metrics = {self.metric: self._share(means), "accuracy_by_sum": self._share(sums)}
        return Result(metrics, self.direction, len(self.items), "items")

    def _share(self, scores: list[Tensor]) -> float:
        pairs = zip(scores, self.items, strict=True)
        return sum(int(score.argmax()) == item.answer for score, item in pairs) / len(scores)


def choice_log_likelihoods(program: Program, item: Item) -> Tensor:
    """Return the sum of the log-probabilities of each choice's tokens [choices], in fp64.

    Each choice is a call of its own: padding to one batch would change the scales of activations
    that are quantized per tensor.

    Raises:
        OptionError: If a token is not in the model's vocabulary.
        RunError: If the program fails.
    """
    device = device_of(program)
    context = item.context.to(device=device)
    sums = [_log_likelihood(program, context, choice.to(device=device)) for choice in item.choices]
    return torch.stack(sums)


def _log_likelihood(program: Program, context: Tensor, choice: Tensor) -> Tensor:
    ids = torch.cat([context, choice])
    logits = language_logits(program, ids)[len(context) - 1 : -1]
    return -nnf.cross_entropy(logits.double(), choice, reduction="sum")


def _check_finite(sums: list[Tensor]) -> None:
    bad = [index for index, values in enumerate(sums) if not bool(values.isfinite().all())]
    if bad:
        raise NumericsError(
            f"the logits of the model are NaN or infinite: the likelihood of choices of item "
            f"{bad[0]} (counted from 0), and of {len(bad)} of {len(sums)} items in all. "
            f"{NAN_HINT}"
        )
