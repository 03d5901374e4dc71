"""Multiple choice with probabilities known by hand."""

import math

import pytest
import torch

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation import Item, MultipleChoice, choice_log_likelihoods
from tests.evaluation.models import ConstantLogits, Unigram


def item(answer: int, *choices: list[int]) -> Item:
    return Item(torch.tensor([0]), tuple(torch.tensor(choice) for choice in choices), answer)


def test_log_likelihood_of_a_choice_is_the_sum_over_its_tokens() -> None:
    values = choice_log_likelihoods(Unigram(0.5, 0.3, 0.2), item(0, [0, 1], [2], [2, 2, 0]))
    expected = [math.log(0.5 * 0.3), math.log(0.2), math.log(0.2 * 0.2 * 0.5)]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_only_the_choice_is_scored_and_it_sees_the_context() -> None:
    def repeats(ids: torch.Tensor) -> torch.Tensor:
        """Predict the token that was just read, with probability near 1."""
        return 50.0 * torch.nn.functional.one_hot(ids, 4).float()

    question = Item(torch.tensor([1, 3]), (torch.tensor([3, 3]), torch.tensor([1, 1])), 0)
    values = choice_log_likelihoods(repeats, question)
    assert values.tolist() == pytest.approx([0.0, -50.0], abs=1e-6)


def test_accuracy_is_normalized_by_length() -> None:
    # Per token: log 0.6 against log 0.4; as sums: 3 log 0.6 = -1.53 against log 0.4 = -0.92.
    items = [item(0, [0, 0, 0], [1]), item(1, [1], [0]), item(1, [0], [1])]
    result = MultipleChoice(items).run(Unigram(0.6, 0.4))
    assert result.metrics == pytest.approx({"accuracy": 2 / 3, "accuracy_by_sum": 1 / 3})
    assert (result.count, result.counted) == (3, "items")


def test_equal_choices_count_for_the_first() -> None:
    result = MultipleChoice([item(0, [0], [1]), item(1, [0], [1])]).run(ConstantLogits(2))
    assert result.metrics["accuracy"] == 0.5


def test_nan_is_named() -> None:
    def model(ids: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, 4), torch.nan if 3 in ids else 0.0)

    with pytest.raises(NumericsError, match=r"item 1 \(counted from 0\), and of 1 of 2 items"):
        MultipleChoice([item(0, [0], [1]), item(0, [3], [1])]).run(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: item(2, [0], [1]), "2 choices has no answer 2"),
        (lambda: item(-1, [0], [1]), "no answer -1"),
        (lambda: item(0, [0]), "at least two choices"),
        (lambda: item(0, [0], []), "none without tokens"),
        (lambda: Item(torch.tensor([]), (torch.tensor([1]), torch.tensor([2])), 0), "a context"),
        (lambda: MultipleChoice([]).run(ConstantLogits(2)), "no items"),
    ],
)
def test_unusable_items_are_refused(make, message) -> None:
    with pytest.raises(OptionError, match=message):
        make()
