r"""A language model of a well-known shape with random weights, compiled: to measure speed with.

No weights are downloaded; time and memory do not depend on their values. The artifact remembers
keys and values (``fpcompiler.huggingface.CachedDecoder``), and ``gpu_decode.py`` runs it.

    python examples/benchmarks/random_llama.py llama-3-8b llama-3-8b-b1.fpc --target sm_90a \
        --scheme "w4a6-row; lm_head: w4a6-row"
    python examples/benchmarks/gpu_decode.py llama-3-8b-b1.fpc --prompt 2048 --compile-prompt

made the record of one text; that of sixteen has ``--batch 16``, and no ``--compile-prompt``.
Presets leave ``lm_head`` in bf16.

LLaMA-3-8B takes 16 GB of memory for its weights in bf16 and about as much again meanwhile, and with
the native library (``fpcompiler doctor``) a minute or two on 16 cores; without it, far longer.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from fpcompiler.huggingface import CachedDecoder

SHAPES: Final[dict[str, dict[str, int]]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64,
    },
}  # fmt: skip
"""Configs of Llama models as transformers has them."""


def build(shape: str, positions: int, layers: int | None = None) -> nn.Module:
    """Return a model in bf16 on the CPU.

    Args:
        shape: A key of :data:`SHAPES`.
        positions: How many it has.
        layers: How many decoder layers; by default as many as the shape.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {**SHAPES[shape], "max_position_embeddings": positions}
    if layers:
        sizes["num_hidden_layers"] = layers
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    # Buffers are computed, so the model is made again where they can be.
    model = model.to_empty(device="cpu").eval()
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Give every weight random values, each layer other ones; a GPU makes them faster."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data.fill_(1)
            continue
        values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        weight.data.copy_(values.uniform_(-0.03, 0.03, generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scheme", default="w4a6-row")
    parser.add_argument("--target", nargs="+", default=["cpu"])
    parser.add_argument("--batch", type=int, default=1, help="texts at once")
    parser.add_argument("--positions", type=int, default=2304, help="of the KV cache")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, to try it out")
    options = parser.parse_args()
    begin = time.perf_counter()
    model = build(options.shape, options.positions, options.layers)
    built = time.perf_counter()
    decoder = CachedDecoder(model, options.batch, options.positions, last_logits=1)
    inputs = torch.arange(8).expand(options.batch, 8).contiguous(), torch.arange(8)
    compiled = fpcompiler.compile(
        decoder, options.scheme, example_inputs=inputs, target=options.target
    )
    done = time.perf_counter()
    compiled.save(options.output)
    saved = time.perf_counter()
    size = options.output.stat().st_size
    print(
        f"{options.output}: {size / 1e9:.2f} GB; built in {built - begin:.0f} s, compiled in "
        f"{done - built:.0f} s, saved in {saved - done:.0f} s"
    )


if __name__ == "__main__":
    main()
