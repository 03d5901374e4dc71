"""Perplexity of models whose probabilities are known, windows, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fpcompiler.errors import NumericsError, OptionError, RunError
from fpcompiler.evaluation import Direction, Perplexity, perplexity, token_losses
from tests.evaluation.models import ConstantLogits, Unigram


@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 300), window=st.integers(2, 300), start=st.none() | st.integers(0, 6))
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    count, window, start
) -> None:
    task = Perplexity(torch.arange(count) % 7, window, start)
    result = task.run(ConstantLogits(7))
    assert result.metrics["perplexity"] == pytest.approx(7, rel=1e-12)
    assert (result.direction, result.counted) == (Direction.LOWER, "tokens")
    if start is not None:
        assert result.count == count
    else:
        assert result.count == count - math.ceil(count / window)


def test_losses_are_minus_log_probabilities() -> None:
    ids = torch.tensor([2, 0, 1, 0])
    losses = token_losses(Unigram(0.5, 0.25, 0.25), ids)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4), math.log(2)], rel=1e-6)
    assert perplexity(Unigram(0.5, 0.25, 0.25), ids) == pytest.approx(2 ** (4 / 3), rel=1e-6)


def test_each_window_is_seen_alone_and_begins_with_the_start_token() -> None:
    calls = []

    def model(ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids.tolist())
        return torch.zeros(*ids.shape, 16)

    Perplexity(torch.arange(5), window=3).run(model)
    Perplexity(torch.arange(5), window=3, start=9).run(model)
    assert calls == [[[0, 1, 2]], [[3, 4]], [[9, 0, 1]], [[9, 2, 3]], [[9, 4]]]


def test_a_single_last_token_has_nothing_to_predict_it_from() -> None:
    assert len(token_losses(ConstantLogits(7), torch.zeros(9, dtype=torch.long), 4)) == 6


def test_a_long_window_is_worked_on_in_pieces_with_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (300,), generator=generator)
    logits = torch.randn(1, 300, 11, generator=generator)
    expected = nn.functional.cross_entropy(logits[0, :-1].double(), ids[1:], reduction="none")
    assert torch.equal(token_losses(lambda _: logits, ids), expected)


def test_progress_sees_every_call() -> None:
    seen = []

    def track(items, total, label):
        seen.append((len(list(items)), total, label))
        return items

    Perplexity(torch.zeros(9, dtype=torch.long), 4).run(ConstantLogits(3), track)
    assert seen == [(2, 2, "windows of text")]


def test_nan_is_named() -> None:
    def model(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, 8)
        logits[0, 1, 3] = torch.nan if 5 in ids.tolist()[0] else 0.0
        return logits

    with pytest.raises(NumericsError, match=r"window 1 of 2 the loss of 1 of 3 tokens.*token 1,"):
        token_losses(model, torch.arange(8), 4)


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    with pytest.raises(OptionError, match="token id 7, but the model's vocabulary has 7 entries"):
        token_losses(ConstantLogits(7), torch.arange(8))
    with pytest.raises(OptionError, match="token id -1"):
        token_losses(ConstantLogits(7), torch.tensor([1, -1]))


def test_a_model_that_fails_on_the_tokens_says_so() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    with pytest.raises(RunError, match=r"Sequential failed on inputs \[1, 8\]: IndexError") as info:
        token_losses(model, torch.arange(8))
    assert "token ids go up to 7: do they belong to this model?" in info.value.__notes__[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda ids: torch.zeros(1, 8), r"gives \[1, 8\] for token ids \[1, 8\]"),
        (lambda ids: {"loss": 1.0}, "has no tensor. Tensors in it: none"),
        (lambda ids: {"last_hidden_state": torch.zeros(1, 8, 9)}, "hidden states and no logits"),
        ((ConstantLogits(8), ConstantLogits(8)), "one program, not a model of 2 parts"),
    ],
)
def test_a_model_of_another_kind_is_refused(model, message) -> None:
    with pytest.raises(OptionError, match=message):
        Perplexity(torch.arange(8)).run(model)


@pytest.mark.parametrize(
    ("ids", "window"),
    [(torch.zeros(1, dtype=torch.long), 4), (torch.zeros(9), 4), (torch.zeros(9).long(), 1),
     (torch.zeros(3, 3).long(), 4)],
)  # fmt: skip
def test_unusable_tokens_are_refused(ids, window) -> None:
    with pytest.raises(OptionError, match="token"):
        token_losses(ConstantLogits(8), ids, window)


@pytest.mark.gpu
def test_data_move_to_the_device_of_the_model() -> None:
    model = Unigram(0.5, 0.5).cuda()
    assert Perplexity(torch.zeros(8).long()).run(model).metrics["perplexity"] == pytest.approx(2)
