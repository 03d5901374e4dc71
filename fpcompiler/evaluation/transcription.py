"""Speech recognition: which share of the words is wrong."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias, final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation.base import Direction, Model, Program, Result, Task, Track, without_bar
from fpcompiler.evaluation.calls import NAN_HINT, call, check_vocabulary, device_of, select_output

__all__ = ["Transcription", "transcribe_greedy", "normalized_words", "word_errors"]

ToText: TypeAlias = Callable[[list[int]], str]
"""The text of token ids, without special tokens."""

_TITLES: Final = {"mr": "mister", "mrs": "missus", "dr": "doctor"}


@final
@dataclass(frozen=True, eq=False)
class Transcription(Task):
    """Word error rate of an encoder-decoder that writes down speech, decoding greedily.

    The model is a pair of programs: an encoder from features to states, and a decoder from token
    ids [1, tokens] and states to logits [1, tokens, vocabulary].

    Attributes:
        clips: The features of each clip, as the encoder takes them.
        references: What was said in each.
        start: Token ids [tokens] that a transcript begins with.
        end: The token that ends it.
        to_text: Gives the text of token ids.
        suppressed: Token ids that are never taken, for instance time stamps.
        longest: Tokens of a transcript at most.
    """

    name: ClassVar[str] = "wer"
    metric: ClassVar[str] = "word_error_rate"
    direction: ClassVar[Direction] = Direction.LOWER
    clips: Sequence[Tensor]
    references: Sequence[str]
    start: Tensor
    end: int
    to_text: ToText
    suppressed: Tensor
    longest: int = 64

    def run(self, model: Model, progress: Track = without_bar) -> Result:
        """Return wrong words per word of the references, and how many words those have."""
        if not self.clips or len(self.clips) != len(self.references):
            raise OptionError(
                f"there are {len(self.clips)} clips and {len(self.references)} references; "
                "each clip needs one."
            )
        if not isinstance(model, tuple) or len(model) != 2:
            raise OptionError("speech recognition needs two programs: an encoder and a decoder.")
        clips = progress(self.clips, len(self.clips), "clips")
        texts = [self._transcribe(*model, clip, index) for index, clip in enumerate(clips)]
        pairs = zip(self.references, texts, strict=True)
        errors, words = (sum(column) for column in zip(*map(_errors, pairs), strict=True))
        if not words:
            raise OptionError("the references have no words.")
        return Result({self.metric: errors / words}, self.direction, words, "words")

    def _transcribe(self, encode: Program, decode: Program, clip: Tensor, index: int) -> str:
        device = device_of(decode)
        try:
            states = select_output(call(encode, clip.to(device=device_of(encode))))
            ids = transcribe_greedy(
                decode,
                states.to(device=device),
                self.start,
                self.end,
                self.suppressed,
                self.longest,
            )
        except NumericsError as error:
            error.add_note(f"in clip {index} (counted from 0)")
            raise
        return self.to_text(ids.tolist())


def transcribe_greedy(
    decode: Program, states: Tensor, start: Tensor, end: int, suppressed: Tensor, longest: int = 64
) -> Tensor:
    """Return ``start`` [tokens] followed by the likeliest tokens for the encoder states.

    Args:
        decode: Gives logits [1, tokens, vocabulary] for ids [1, tokens] and states.
        states: What the encoder heard [1, frames, width].
        start: The first tokens.
        end: The token that ends the text; it is not part of the result.
        suppressed: Tokens that are never taken.
        longest: Tokens of the result at most.

    Raises:
        OptionError: If a token is not in the vocabulary of the decoder.
        NumericsError: If a logit is NaN.
        RunError: If the decoder fails.
    """
    ids, suppressed = start.to(states.device), suppressed.to(states.device)
    while len(ids) < longest:
        logits = select_output(call(decode, ids[None], states))[0, -1].clone()
        if len(ids) == len(start):
            special = torch.cat([ids, suppressed, ids.new_tensor([end])])
            check_vocabulary(special, len(logits))
        logits[suppressed] = -torch.inf
        token = logits.argmax()
        if logits[token].isnan():
            raise NumericsError(
                f"the logits of the decoder are NaN at token {len(ids)} of a transcript. {NAN_HINT}"
            )
        if token == end:
            break
        ids = torch.cat([ids, token[None]])
    return ids


def word_errors(reference: str, text: str) -> tuple[int, int]:
    """Return the least words to insert, delete or replace, and the words of the reference.

    Both texts are compared as :func:`normalized_words`.
    """
    wanted, found = normalized_words(reference), normalized_words(text)
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
            diagonal, row[j] = row[j], cost
    return row[-1], len(wanted)


def normalized_words(text: str) -> list[str]:
    """Return the words of a text in the form in which they are compared.

    Unicode NFKC and case folding; everything but letters, marks, digits and apostrophes separates
    words, so punctuation and hyphens do not count; and "mr", "mrs" and "dr" are written out. A
    language without spaces needs to be cut into words (or characters) before.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return [_TITLES.get(word, word) for word in "".join(kept).split()]


def _errors(pair: tuple[str, str]) -> tuple[int, int]:
    return word_errors(*pair)
