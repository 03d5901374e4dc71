"""Makes the checkpoints of this folder with the tools themselves; the tests only read them.

    python tests/interop/data/make.py

in an environment with llmcompressor 0.14, nvidia-modelopt 0.47 and datasets: a Llama of one layer
with fixed random weights, quantized to NVFP4 and MXFP4 by llm-compressor, and to NVFP4 by NVIDIA's
Model Optimizer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from modelopt.torch.export import export_hf_checkpoint
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
WORDS = 32
JUNK = ("recipe.yaml", "tokenizer.json", "tokenizer_config.json")


def base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # gains near 1, as trained layers have them, and rows that differ
            torch.manual_seed(len(name))
            sizes = torch.empty(len(weight), 1).uniform_(0.5, 2)
            weight.data = (torch.randn_like(weight) * sizes / weight.shape[1] ** 0.5).bfloat16()
    return model


def tokens() -> torch.Tensor:
    return torch.randint(3, WORDS, (8, 32), generator=torch.Generator().manual_seed(0))


def with_llmcompressor(folder: Path, scheme: str) -> None:
    model = LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.bfloat16)
    vocabulary = {f"t{i}": i for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    rows = {"input_ids": tokens().tolist(), "attention_mask": [[1] * 32] * 8}
    oneshot(
        model=model,
        recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
        dataset=Dataset.from_dict(rows),
        max_seq_length=32,
        num_calibration_samples=8,
        processor=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0"),
    )
    model.save_pretrained(folder, save_compressed=True)


def with_modelopt(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.bfloat16)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda called: called(tokens()))
    export_hf_checkpoint(model, export_dir=folder)


def main() -> None:
    for name in ("base", "llmcompressor-nvfp4", "llmcompressor-mxfp4", "modelopt-nvfp4"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    base().save_pretrained(FOLDER / "base")
    with_llmcompressor(FOLDER / "llmcompressor-nvfp4", "NVFP4")
    with_llmcompressor(FOLDER / "llmcompressor-mxfp4", "MXFP4")
    with_modelopt(FOLDER / "modelopt-nvfp4")
    for path in FOLDER.rglob("*"):
        if path.name in JUNK:
            path.unlink()


if __name__ == "__main__":
    main()
