"""Words and their errors, and greedy decoding by a model that spells a known text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation import Transcription, normalized_words, transcribe_greedy, word_errors

WORDS = st.lists(st.sampled_from("abc"), max_size=6)


@pytest.mark.parametrize(
    ("reference", "text", "errors"),
    [
        ("a b c", "a b c", (0, 3)),
        ("ill disposed", "Ill-disposed.", (0, 2)),
        ("mister john", "Mr. John", (0, 2)),
        ("a b c d", "a x c", (2, 4)),
        ("a b", "", (2, 2)),
        ("a", "b a c", (2, 1)),
        ("", "a", (1, 0)),
        ("don't", "don\u2019t", (0, 1)),
        ("straße", "STRASSE", (0, 1)),
        ("the cat sat", "the sat cat", (2, 3)),
    ],
)
def test_word_errors(reference: str, text: str, errors: tuple[int, int]) -> None:
    assert word_errors(reference, text) == errors


def test_normalization() -> None:
    assert normalized_words("Dr. Ångström's 3 ill-fated, \u201cruns\u201d; हिन्दी") == [
        "doctor", "ångström's", "3", "ill", "fated", "runs", "हिन्दी",
    ]  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(a=WORDS, b=WORDS, c=WORDS)
def test_word_errors_are_a_distance(a, b, c) -> None:
    def distance(x: list[str], y: list[str]) -> int:
        return word_errors(" ".join(x), " ".join(y))[0]

    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))
    assert distance(a, c) <= distance(a, b) + distance(b, c)


VOCABULARY = ["<start>", "<end>", "<time>", "one", "two", "three"]


def encode(features: torch.Tensor) -> torch.Tensor:
    return features


def decode(ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Say the tokens that the states [1, tokens] name, then the end; time is always likeliest."""
    said = [*states[0].long().tolist(), 1]
    following = torch.tensor([said[: ids.shape[1]]])
    logits = torch.nn.functional.one_hot(following, len(VOCABULARY)).float()
    logits[..., 2] = 2.0
    return logits


def task(*clips: list[int], references: list[str], **changes) -> Transcription:
    fields = {
        "clips": [torch.tensor([clip], dtype=torch.float32) for clip in clips],
        "references": references,
        "start": torch.tensor([0]),
        "end": 1,
        "to_text": lambda ids: " ".join(VOCABULARY[i] for i in ids if i > 2),
        "suppressed": torch.tensor([2]),
    }
    return Transcription(**{**fields, **changes})


def test_word_error_rate_weighs_words_not_clips() -> None:
    result = task([3, 4], [5], references=["one two three four", "three"]).run((encode, decode))
    assert result.metrics == {"word_error_rate": 2 / 5}
    assert (result.count, result.counted) == (5, "words")


def test_greedy_decoding_stops_at_the_end_and_at_the_longest() -> None:
    states, start = torch.tensor([[3.0, 4.0, 5.0]]), torch.tensor([0])
    suppressed = torch.tensor([2])
    ids = transcribe_greedy(decode, states, start, 1, suppressed)
    assert ids.tolist() == [0, 3, 4, 5]
    assert transcribe_greedy(decode, states, start, 1, suppressed, 2).tolist() == [0, 3]
    no_suppression = transcribe_greedy(decode, states, start, 1, torch.tensor([]).long(), 3)
    assert no_suppression.tolist() == [0, 2, 2]


def test_nan_is_named() -> None:
    def broken(ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return decode(ids, states) * (torch.nan if ids.shape[1] == 2 else 1.0)

    with pytest.raises(NumericsError, match="NaN at token 2 of a transcript") as info:
        task([3, 4], references=["one two"]).run((encode, broken))
    assert info.value.__notes__ == ["in clip 0 (counted from 0)"]


@pytest.mark.parametrize(
    ("given", "model", "message"),
    [
        (task([3], references=["one", "two"]), (encode, decode), "1 clips and 2 references"),
        (task([3], references=["..."]), (encode, decode), "the references have no words"),
        (task([3], references=["one"]), decode, "two programs: an encoder and a decoder"),
        (task([3], references=["one"], suppressed=torch.tensor([6])), (encode, decode),
         "token id 6, but the model's vocabulary has 6 entries"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(given, model, message) -> None:
    with pytest.raises(OptionError, match=message):
        given.run(model)
