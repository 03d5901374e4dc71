"""Calibration data for the models of the zoo: real, and none of what their metrics are taken on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.zoo import corpora, minilm, smollm2, whisper
from examples.zoo.metrics import transcribe_greedy

_SPEECH = 20 * 16000
"""Samples of speech in each recording of 30 seconds."""

Batches = list[tuple[Any, ...]]
"""The arguments of one call each."""


def smollm2_batches(count: int = 16, length: int = 512, first_article: int = 20) -> Batches:
    """Return the beginnings [1, length] of articles after those that perplexity is taken on."""
    words = smollm2.tokenizer()
    batches: Batches = []
    for number, article in enumerate(corpora.wikipedia()):
        ids = words.encode(article[: 8 * length]).ids if number >= first_article else []
        if len(ids) >= length:
            batches.append((torch.tensor([ids[:length]]),))
        if len(batches) == count:
            break
    return batches


def minilm_batches(count: int = 16) -> Batches:
    """Return token ids and masks of news texts, eight in a batch; similarities are of 50 others."""
    texts = corpora.lee_background()
    return [minilm.batch(texts[8 * i : 8 * i + 8]) for i in range(count)]


def dinov2_batches() -> Batches:
    """Return eight pictures, two in a batch, none of those that features are compared on."""
    return [(pixels,) for pixels in corpora.more_pictures().split(2)]


def whisper_batches(clips: Path, encode: Any, decode: Any) -> Mapping[str, Batches]:
    """Return what encoder and decoder read for recordings of other speakers and words.

    Five clips of two seconds are joined and repeated, each time from another one on: padded with
    silence, one by one, they would teach the encoder silence.

    Args:
        clips: The folder of :func:`examples.zoo.corpora.librivox`; the clips are beside it.
        encode: The encoder in fp32.
        decode: The decoder in fp32, whose own transcripts are what the decoder reads.
    """
    cards = corpora.spoken_cards(clips.parent / "cards")
    joined = [torch.cat([*cards[i:], *cards[:i]] * 2)[:_SPEECH] for i in range(len(cards))]
    inputs = whisper.inputs(joined)
    encoder = [(features,) for features in inputs["features"].split(1)]
    decoder = [_decoder_call(encode, decode, features, inputs) for (features,) in encoder]
    return {"encoder": encoder, "decoder": decoder}


@torch.no_grad()
def _decoder_call(
    encode: Any, decode: Any, features: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    states, end = encode(features), int(inputs["end"])
    spoken = transcribe_greedy(decode, states, inputs["start"], end, inputs["special"], 64)
    return spoken[None], states
