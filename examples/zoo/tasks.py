"""The models of the zoo with what is measured on them: parts to compile, inputs, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from examples.zoo import calibration, corpora, dinov2, metrics, minilm, smollm2, whisper
from examples.zoo.calibration import Batches
from examples.zoo.runs import Tensors


@dataclass(frozen=True)
class Part:
    """A module that is compiled on its own.

    Attributes:
        module: The eager module.
        example: The arguments of an example call.
        probe: The arguments of the call on which layers are compared.
    """

    module: nn.Module
    example: tuple[Any, ...]
    probe: tuple[Any, ...]


class Task(ABC):
    """A model, its inputs and its metrics."""

    name: str
    protocol: str

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """Load the model; return its parts by name."""

    @abstractmethod
    def calibration(self, parts: Mapping[str, Part]) -> Mapping[str, Batches]:
        """Return calibration data for each part, none of which :meth:`inputs` returns."""

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """Return what ``runs.RUNS[name]`` reads."""

    @abstractmethod
    def score(self, results: Tensors, reference: Tensors) -> dict[str, float]:
        """Return the metrics of results, some of them against those of the fp32 model."""


@final
class SmolLM2(Task):
    """Perplexity on Wikipedia."""

    name = "smollm2"

    def __init__(self, tokens: int = 1536) -> None:
        self.tokens = tokens
        self.protocol = (
            f"perplexity of the first {tokens} tokens of the Wikipedia text, in windows of 512 "
            "that do not overlap"
        )

    def parts(self) -> Mapping[str, Part]:
        """Return the decoder; its layers are compared on 128 tokens of the text."""
        probe = smollm2.tokens(1024 + 128)[None, 1024:]
        return {"model": Part(smollm2.load(), smollm2.example_inputs(), (probe,))}

    def calibration(self, parts: Mapping[str, Part]) -> Mapping[str, Batches]:
        """Return the beginnings of later articles."""
        return {"model": calibration.smollm2_batches()}

    def inputs(self) -> dict[str, Tensor]:
        """Return the text."""
        return {"ids": smollm2.tokens(self.tokens)}

    def score(self, results: Tensors, reference: Tensors) -> dict[str, float]:
        """Return the perplexity."""
        return {"perplexity": float(results["losses"].mean().exp())}


@final
class MiniLM(Task):
    """Similarities of news texts."""

    name = "minilm"
    protocol = (
        "50 news texts (Lee): Pearson correlation of cosines with 1,225 human ratings; mean cosine "
        "of a text's vector with that of the fp32 model"
    )

    def parts(self) -> Mapping[str, Part]:
        """Return the encoder."""
        texts, _ = corpora.lee()
        probe = minilm.batch(texts[4:8], longest=64)
        return {"model": Part(minilm.load(), minilm.example_inputs(), probe)}

    def calibration(self, parts: Mapping[str, Part]) -> Mapping[str, Batches]:
        """Return other news texts."""
        return {"model": calibration.minilm_batches()}

    def inputs(self) -> dict[str, Tensor]:
        """Return the 50 texts."""
        texts, _ = corpora.lee()
        return minilm.inputs(texts)

    def score(self, results: Tensors, reference: Tensors) -> dict[str, float]:
        """Return the agreement with people, and with the fp32 model."""
        _, ratings = corpora.lee()
        return {
            "lee_pearson": metrics.similarity_pearson(results["vectors"], ratings),
            "cosine": metrics.mean_cosine(reference["vectors"], results["vectors"]),
        }


@final
class DINOv2(Task):
    """Features and saliency of photographs."""

    name = "dinov2"
    protocol = (
        "8 photographs of scikit-image at 224 pixels, against the fp32 model: mean cosine of patch "
        "tokens; mean absolute error of saliency (0 to 1)"
    )

    def parts(self) -> Mapping[str, Part]:
        """Return the backbone with its head."""
        pixels = corpora.photographs()
        return {"model": Part(dinov2.load(), (pixels[:2],), (pixels[2:4],))}

    def calibration(self, parts: Mapping[str, Part]) -> Mapping[str, Batches]:
        """Return other pictures."""
        return {"model": calibration.dinov2_batches()}

    def inputs(self) -> dict[str, Tensor]:
        """Return all photographs."""
        return {"pixels": corpora.photographs()}

    def score(self, results: Tensors, reference: Tensors) -> dict[str, float]:
        """Return how close features and saliency are to those of the fp32 model."""
        return {
            "patch_cosine": metrics.mean_cosine(reference["tokens"], results["tokens"]),
            "saliency_mae": metrics.mean_absolute_error(reference["saliency"], results["saliency"]),
        }


@final
class Whisper(Task):
    """Words of read speech."""

    name = "whisper"
    protocol = "5 LibriVox clips, 71 words, greedy decoding: word error rate"

    def __init__(self, clips: Path = corpora.LIBRIVOX) -> None:
        self.clips = clips

    def parts(self) -> Mapping[str, Part]:
        """Return the encoder and the decoder."""
        encoder, decoder = whisper.split(whisper.load())
        features = self.inputs()["features"]
        with torch.no_grad():
            states = encoder(features[:2])
        example = whisper.decoder_example_inputs(states[:1])
        probe = whisper.decoder_example_inputs(states[1:])
        return {
            "encoder": Part(encoder, (features[:1],), (features[1:2],)),
            "decoder": Part(decoder, example, probe),
        }

    def calibration(self, parts: Mapping[str, Part]) -> Mapping[str, Batches]:
        """Return other clips."""
        encoder, decoder = parts["encoder"].module, parts["decoder"].module
        return calibration.whisper_batches(self.clips, encoder, decoder)

    def inputs(self) -> dict[str, Tensor]:
        """Return the clips."""
        return whisper.inputs([samples for samples, _ in corpora.librivox(self.clips)])

    def score(self, results: Tensors, reference: Tensors) -> dict[str, float]:
        """Return the share of wrong words."""
        texts = whisper.texts(results["transcripts"])
        clips = corpora.librivox(self.clips)
        pairs = [metrics.word_errors(w, text) for (_, w), text in zip(clips, texts, strict=True)]
        errors, total = (sum(column) for column in zip(*pairs, strict=True))
        return {"word_error_rate": errors / total, "word_errors": errors}
