"""Tiny Hugging Face models with random weights, one for each architecture the project names.

The models are the plain classes of transformers, called as users call them (``use_cache`` left at
its default), so they test the capture of such models too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.models import VOCABULARY, Call, Case, normal, token_ids

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf-llama": ("llama", "AutoModelForCausalLM", _DECODER),
    "hf-mistral": ("mistral", "AutoModelForCausalLM", _DECODER | {"sliding_window": 8}),
    "hf-qwen3": ("qwen3", "AutoModelForCausalLM", _DECODER | {"head_dim": 16}),
    "hf-gemma": ("gemma", "AutoModelForCausalLM", _DECODER | {"head_dim": 16}),
    "hf-gemma2": (
        "gemma2",
        "AutoModelForCausalLM",
        _DECODER | {"head_dim": 16, "sliding_window": 8},
    ),
    "hf-gpt2": (
        "gpt2",
        "AutoModelForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "hf-opt": (
        "opt",
        "AutoModelForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    "hf-bert": ("bert", "AutoModel", _ENCODER),
    "hf-vit": (
        "vit",
        "AutoModelForImageClassification",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
    "hf-mixtral": ("mixtral", "AutoModelForCausalLM", _DECODER | {"num_local_experts": 4}),
    "hf-whisper": (
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 16,
            "max_source_positions": 24,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
"""Model type, auto class and config of each model."""


def hf_model(name: str, **changes: Any) -> nn.Module:
    """Build the model of a case with fixed random weights; ``changes`` go to its config."""
    import transformers

    model_type, auto_class, config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = transformers.AutoConfig.for_model(model_type, **(config | changes))
        return getattr(transformers, auto_class).from_config(built).eval()


def hf_cases() -> dict[str, Case]:
    """Return the Hugging Face cases by name."""
    decoders = (_decoder_case("hf-llama", "eager"), _decoder_case("hf-gpt2", "sdpa"))
    return {name: _case(name) for name in CONFIGS} | {case.name: case for case in decoders}


def _case(name: str) -> Case:
    first, *others = _calls(name)

    def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return hf_model(name), *first()

    return Case(name, make, lambda: [call() for call in others])


def _decoder_case(name: str, attention: str) -> Case:
    """A buffer-cache decoder: a prompt, a second one, and single tokens.

    Attention is chosen so that eager mode has one path for all lengths: with ``sdpa`` and grouped
    heads transformers packs the heads of a single token in another way, which moves last bits.
    """

    def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        from fpcompiler.huggingface import CachedDecoder

        model = hf_model(name, attn_implementation=attention)
        return CachedDecoder(model, max_batch=2, max_seq=32), *_tokens(0, 5)

    def other_inputs() -> list[Call]:
        return [_tokens(5, 8), _tokens(8, 9), _tokens(9, 10)]

    return Case(f"decoder-{name.removeprefix('hf-')}", make, other_inputs, state=True)


def _tokens(first: int, last: int) -> Call:
    return (token_ids(2, last - first, seed=first), torch.arange(first, last)), {}


def _calls(name: str) -> tuple[Callable[[], Call], ...]:
    if name == "hf-vit":
        return tuple(partial(_image, batch) for batch in (2, 1, 5))
    if name == "hf-whisper":
        return tuple(partial(_speech, *shape) for shape in ((2, 6), (1, 6), (3, 11)))
    return tuple(partial(_text, *shape) for shape in ((2, 12), (1, 12), (3, 20)))


def _text(batch: int, length: int) -> Call:
    """Token ids with a mask that hides the end of the last text."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 2 :] = 0
    return (), {"input_ids": token_ids(batch, length), "attention_mask": mask}


def _image(batch: int) -> Call:
    return (), {"pixel_values": normal(batch, 3, 32, 32)}


def _speech(batch: int, length: int) -> Call:
    features = normal(batch, 16, 48)
    return (), {"input_features": features, "decoder_input_ids": token_ids(batch, length)}
