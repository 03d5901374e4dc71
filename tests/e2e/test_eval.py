"""The ready tasks of ``examples/eval`` give what is on record, and the quiz is a fair one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from fpcompiler.cli.main import main
from fpcompiler.errors import DependencyError

for module in ("transformers", "tokenizers", "onnx", "PIL"):
    pytest.importorskip(module)

from examples.eval import models, tasks  # noqa: E402

T = TypeVar("T")


def available(load: Callable[[], T]) -> T:
    """Return what ``load`` returns; skip the test, with the reason, if its package is missing."""
    try:
        return load()
    except DependencyError as error:
        pytest.skip(str(error))


def test_the_quiz_asks_what_follows() -> None:
    tokens = torch.arange(10_000)
    quiz = tasks.cloze(tokens, items=40)
    assert len(quiz.items) == 40
    for item in quiz.items:
        start, following = int(item.context[0]), int(item.context[-1]) + 1
        assert torch.equal(item.context, tokens[start:following])
        assert item.choices[item.answer][0] == following
        begins = [int(choice[0]) for choice in item.choices]
        assert len(set(begins)) == 4
        assert [len(choice) for choice in item.choices] == [12] * 4
        others = [begin for begin in begins if begin != following]
        assert all(begin <= start - 12 or begin >= following + 12 for begin in others)
        assert all(abs(begin - following) <= 1000 for begin in others)
    answers = [item.answer for item in quiz.items]
    assert {*answers} == {0, 1, 2, 3}
    assert [item.answer for item in tasks.cloze(tokens, items=40).items] == answers


def test_minilm_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    available(models.minilm)
    available(tasks.lee_similarity)
    task = "examples.eval.tasks:lee_similarity"
    assert main(["eval", "examples.eval.models:minilm", "--task", task]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " pearson " in line]
    assert float(line.split()[3]) == pytest.approx(0.656, abs=1e-3)
    assert line.endswith("1225 pairs")


@pytest.mark.slow
def test_smollm2_predicts_wikipedia() -> None:
    model, _ = available(models.smollm2)
    result = available(lambda: tasks.wikipedia_perplexity(512)).run(model)
    assert result.metrics["perplexity"] == pytest.approx(23.487, rel=1e-3)
    quiz = tasks.wikipedia_cloze(8)
    assert quiz.run(model).metrics["accuracy"] > 0.25


def test_dinov2_agrees_with_itself_and_not_with_another() -> None:
    model, _ = available(models.dinov2)
    task = available(tasks.photograph_features)
    few = type(task)(task.batches[:1], task.output).against(model)
    assert few.run(model).metrics["cosine"] == pytest.approx(1)
    assert few.run(model).count == 2 * 256
    turned = few.run(lambda pixels: (-model(pixels)[0], None))
    assert turned.metrics["cosine"] == pytest.approx(-1)


@pytest.mark.slow
def test_whisper_errs_in_three_of_71_words() -> None:
    task = available(tasks.librivox_words)
    encoder, _ = available(models.whisper_encoder)
    decoder, _ = available(models.whisper_decoder)
    result = task.run((encoder, decoder))
    assert result.metrics["word_error_rate"] == pytest.approx(3 / 71)
