r"""Ready tasks on real data for ``fpcompiler eval``.

    fpcompiler compile examples.eval.models:smollm2 -o smollm2.fpc
    fpcompiler eval smollm2.fpc --against examples.eval.models:smollm2 \
        --task examples.eval.tasks:wikipedia_perplexity --task examples.eval.tasks:wikipedia_cloze

A task of your own is a function like these. The data are in packages of PyPI and Debian; an error
names the one that is missing. Run the commands in the folder of the project.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.zoo import corpora, minilm, smollm2, whisper
from fpcompiler.evaluation import (
    FeatureAgreement,
    Item,
    MultipleChoice,
    Perplexity,
    Similarity,
    Transcription,
)


def wikipedia_perplexity(tokens: int = 4096) -> Perplexity:
    """Return the perplexity of the Wikipedia text for SmolLM2."""
    return Perplexity(smollm2.tokens(tokens), window=512)


def wikipedia_cloze(items: int = 100) -> MultipleChoice:
    """Return a made-up quiz for SmolLM2: which 12 tokens of Wikipedia follow 24 others?

    This is no published benchmark. Of the four choices one is what follows, the others were taken
    from the 2,000 tokens around it, so that they are mostly about the same subject. All choices are
    equally long. The standard error of an accuracy near 0.7 is 0.046 with 100 items.
    """
    return cloze(smollm2.tokens(96 * items + 4096), items)


def cloze(
    tokens: Tensor, items: int, context: int = 24, length: int = 12, reach: int = 1000
) -> MultipleChoice:
    """Return a quiz made of a text [tokens]: what follows, against three parts found elsewhere.

    Args:
        tokens: The text; long enough that the questions are apart from each other.
        items: Number of questions; they are spread evenly over the text.
        context: Tokens before the choices.
        length: Tokens of each choice.
        reach: How far away the wrong choices begin at most, in tokens.
    """
    generator = torch.Generator().manual_seed(0)
    starts = torch.linspace(reach, len(tokens) - reach - context - length, items).long()
    return MultipleChoice(
        tuple(_question(tokens, int(start), context, length, reach, generator) for start in starts)
    )


def _question(
    tokens: Tensor, start: int, context: int, length: int, reach: int, generator: torch.Generator
) -> Item:
    right = start + context
    # Distances from which a choice overlaps neither the context nor what follows it.
    offsets = torch.cat(
        [torch.arange(-reach, -context - length + 1), torch.arange(length, reach + 1)]
    )
    wrong = right + offsets[torch.randperm(len(offsets), generator=generator)[:3]]
    answer = int(torch.randint(4, (), generator=generator))
    places = wrong.tolist()
    places.insert(answer, right)
    choices = tuple(tokens[place : place + length] for place in places)
    return Item(tokens[start:right], choices, answer)


def lee_similarity() -> Similarity:
    """Return the similarity of 50 news texts for MiniLM: 1,225 pairs, rated by people."""
    texts, ratings = corpora.lee()
    pairs = torch.triu_indices(len(texts), len(texts), offset=1).T
    first, second = pairs.unbind(1)
    batches = [minilm.batch(texts[start : start + 10]) for start in range(0, len(texts), 10)]
    return Similarity(batches, pairs, ratings[first, second])


def photograph_features() -> FeatureAgreement:
    """Return the agreement of DINOv2's patch features on eight photographs."""
    return FeatureAgreement([(batch,) for batch in corpora.photographs().split(2)], output="0")


def librivox_words(folder: Path = corpora.LIBRIVOX) -> Transcription:
    """Return the word error rate of Whisper on five clips of a novel: 71 words."""
    clips = corpora.librivox(folder)
    given = whisper.inputs([sound for sound, _ in clips])
    return Transcription(
        clips=given["features"].split(1),
        references=[words for _, words in clips],
        start=given["start"],
        end=int(given["end"]),
        to_text=whisper.tokenizer().decode,
        suppressed=given["special"],
    )
