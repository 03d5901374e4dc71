"""Checkpoints of SmolLM2-135M: exported for compressed-tensors, imported again, and compared.

    python examples/benchmarks/interop_checkpoints.py
    python examples/benchmarks/interop_checkpoints.py --model smollm2 --llmcompressor smollm2-nvfp4

For each scheme: does the package compressed-tensors decompress exactly our values, does
transformers generate the same text as the reference backend on weights alone, and does the way
back give every bit? With ``--llmcompressor``, a checkpoint that llm-compressor has made of
``--model`` is imported too, and run beside its decompression: as the package gives it, rounded to
bf16, and without that rounding. What powers of two as scales of tensors cost is measured as
perplexity. The script prints the numbers, writes ``results/interop_checkpoints.json``, and exits
with 1 if something is not equal. ``--part`` measures one of the three again and leaves the others
as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fpcompiler  # noqa: E402
from examples.benchmarks.memory import machine  # noqa: E402
from examples.zoo import metrics, smollm2  # noqa: E402
from fpcompiler import numerics  # noqa: E402
from fpcompiler.interop.checkpoints.layers import layer_weights  # noqa: E402
from fpcompiler.interop.checkpoints.reading import read_checkpoint  # noqa: E402
from fpcompiler.runtime.model import CompiledModel  # noqa: E402

RESULTS = ROOT / "examples" / "benchmarks" / "results" / "interop_checkpoints.json"
NVFP4 = "w=f4E2M1FN@tensor:f32/block16:f8E4M3FN,a=none"
PARTS = ("exported", "llmcompressor", "perplexity")
LLMCOMPRESSOR = "0.14.0.1"
PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time there was a")
NEW_TOKENS = 24
TOKENS = 1536


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="SmolLM2 as a folder; by default written anew")
    parser.add_argument("--llmcompressor", type=Path, help="what llm-compressor has made of it")
    parser.add_argument("--write-model", type=Path, help="only write SmolLM2 as a folder there")
    parser.add_argument("--part", choices=PARTS, help="measure this alone; by default all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the numbers")
    options = parser.parse_args(arguments)
    if options.write_model:
        write_model(options.write_model)
        return 0
    before = json.loads(options.output.read_text()) if options.part else {}
    with tempfile.TemporaryDirectory() as work:
        folder = options.model or write_model(Path(work) / "smollm2")
        parts = [options.part] if options.part else PARTS
        report = {**before, **about(), **measure(parts, folder, options.llmcompressor, Path(work))}
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    for name in PARTS:
        print(name, json.dumps(report.get(name), indent=2))
    print(f"written to {options.output}")
    rows = [*report.get("exported", ()), *filter(None, [report.get("llmcompressor")])]
    return 0 if all(row["all_equal"] for row in rows) else 1


def write_model(folder: Path) -> Path:
    """Write SmolLM2 in bf16 as transformers does, with its tokenizer; return the folder."""
    from transformers import PreTrainedTokenizerFast

    smollm2.load().to(torch.bfloat16).save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=smollm2.tokenizer(), pad_token="<|im_end|>", eos_token="<|im_end|>"
    )
    words.save_pretrained(folder)
    return folder


def about() -> dict[str, Any]:
    """Return what was measured, and where."""
    return {
        "what": "SmolLM2-135M-Instruct as quantized checkpoints, exported and imported",
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        "packages": {
            name: importlib.metadata.version(name)
            for name in ("compressed-tensors", "transformers", "safetensors")
        },
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
    }


def measure(
    parts: Sequence[str], folder: Path, llmcompressor: Path | None, work: Path
) -> dict[str, Any]:
    """Return the numbers of some parts as JSON values."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    if "exported" in parts:
        found["exported"] = []
        for scheme, options in schemes():
            target = work / f"export-{len(found['exported'])}"
            found["exported"].append(exported(model, scheme, options, folder, target))
    if "llmcompressor" in parts and llmcompressor:
        found["llmcompressor"] = imported(llmcompressor, folder)
    if "perplexity" in parts:
        found["perplexity"] = {
            "tokens": TOKENS,
            "fp32": perplexity(lambda ids: model(input_ids=ids).logits),
            "nvfp4 weights, scales of tensors as they come": compiled_perplexity(model, {}),
            "nvfp4 weights, shared powers of two": compiled_perplexity(
                model, {"share_scales": True}
            ),
        }
    return found


def schemes() -> list[tuple[str, dict[str, Any]]]:
    """Return what is exported, and how it is compiled."""
    calibration = [{"input_ids": ids[None]} for ids in smollm2.tokens(1024).split(256)]
    shared = {"share_scales": True}
    static = {**shared, "static_inputs": True, "calibration": calibration}
    return [(NVFP4, shared), ("nvfp4", static), ("mxfp4", {}), ("mxfp8", {})]


def exported(
    model: Any, scheme: str, options: dict[str, Any], folder: Path, target: Path
) -> dict[str, Any]:
    """Export one scheme and compare with all who read it."""
    start = time.process_time()
    compiled = fpcompiler.compile(
        model, scheme, example_kwargs=example(), target="reference", **options
    )
    middle = time.process_time()
    compiled.export(target, "compressed-tensors", model=folder)
    end = time.process_time()
    again = fpcompiler.import_checkpoint(
        target, original=folder, target="reference", example_kwargs=example()
    )
    first, second = layer_weights(compiled.artifact), layer_weights(again.artifact)
    bits = sum(
        torch.equal(a.codes, second[name].codes)
        and all(map(torch.equal, a.scales, second[name].scales))
        for name, a in first.items()
    )
    row = {
        "scheme": compiled.scheme,
        "by": "fpcompiler",
        **compared(target),
        "layers_with_every_bit_on_the_way_back": bits,
        "cpu_seconds": {"compile": round(middle - start, 1), "export": round(end - middle, 1)},
    }
    return {**row, "all_equal": is_equal(row) and bits == row["layers"]}


def imported(source: Path, folder: Path) -> dict[str, Any]:
    """Import a checkpoint of another tool in fp32, and run it beside its decompression."""
    layers = read_checkpoint(source).layers
    values = decompressed(source)
    alike = sum(
        torch.equal(values[name], layer.dequantized().to(values[name].dtype))
        for name, layer in layers.items()
    )
    ours = fpcompiler.import_checkpoint(
        source, model=in_fp32(folder), original=folder, weights_only=True, target="reference",
        example_kwargs=example(),
    )  # fmt: skip
    whole, rounded = in_fp32(folder), in_fp32(folder)
    for name, layer in layers.items():
        whole.get_submodule(name).weight.data = layer.dequantized()
        rounded.get_submodule(name).weight.data = values[name].float()
    texts = [generated(ours, prompt) for prompt in PROMPTS]
    row = {
        "by": f"llm-compressor {LLMCOMPRESSOR}",
        "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "layers": len(layers),
        "layers_that_compressed_tensors_decompresses_alike": alike,
        "logits_sqnr_db": {
            "beside the decompression": sqnr(whole, ours),
            "beside the decompression rounded to bf16": sqnr(rounded, ours),
        },
        "prompts_with_the_same_text": {
            "as the decompression": same_texts(whole, texts),
            "as the decompression rounded to bf16": same_texts(rounded, texts),
        },
    }
    same = row["prompts_with_the_same_text"]["as the decompression"] == len(PROMPTS)
    return {**row, "all_equal": alike == len(layers) and same}


def in_fp32(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def sqnr(expected: Any, got: Any) -> float:
    a, b = expected(**example()).logits, got(**example()).logits
    return round(numerics.sqnr_db(a, b), 2)


def same_texts(model: Any, texts: list[Tensor]) -> int:
    with torch.no_grad():
        theirs = [generated(model, prompt) for prompt in PROMPTS]
    return sum(map(torch.equal, texts, theirs))


def is_equal(row: dict[str, Any]) -> bool:
    return bool(
        row["layers"] == row["layers_that_compressed_tensors_decompresses_alike"]
        and row["prompts_with_the_same_text"] == len(PROMPTS)
    )


def compared(checkpoint: Path) -> dict[str, Any]:
    """Compare a checkpoint's values and texts with those of the package and of transformers."""
    layers = read_checkpoint(checkpoint).layers
    values = decompressed(checkpoint)
    same = sum(
        torch.equal(values[name], layer.dequantized().to(values[name].dtype))
        for name, layer in layers.items()
    )
    exact = sum(
        torch.equal(values[name].float(), layer.dequantized()) for name, layer in layers.items()
    )
    ours = fpcompiler.import_checkpoint(
        checkpoint,
        weights_only=True,
        target="reference",
        example_kwargs=example(),
    )
    texts = [generated(ours, prompt) for prompt in PROMPTS]
    theirs = transformers_texts(checkpoint, ours)
    return {
        "bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        "layers": len(layers),
        "values": sum(layer.n * layer.k for layer in layers.values()),
        "layers_that_compressed_tensors_decompresses_alike": same,
        "layers_alike_without_rounding_to_bf16": exact,
        "prompts_with_the_same_text": sum(map(torch.equal, texts, theirs)),
        "texts": [smollm2.tokenizer().decode(ids.tolist()) for ids in texts],
    }


def example() -> dict[str, Tensor]:
    return {"input_ids": smollm2.example_inputs()[0]}


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Return the weights as the package compressed-tensors decompresses them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig.model_validate(config).config_groups.values()))
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    return {
        layer: compressor.decompress(parts, scheme)["weight"]
        for layer, parts in layers.items()
        if "weight_scale" in parts
    }


def transformers_texts(folder: Path, ours: CompiledModel) -> list[Tensor]:
    """Return what transformers generates with the dequantized weights, in the dtype of ours."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=ours(**example()).logits.dtype,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    return [
        model.generate(prompt_ids(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        for prompt in PROMPTS
    ]


def prompt_ids(prompt: str) -> Tensor:
    return torch.tensor([smollm2.tokenizer().encode(prompt).ids])


def generated(model: Any, prompt: str) -> Tensor:
    """Return the prompt and the likeliest tokens after it, as transformers stops them."""
    ids = prompt_ids(prompt)
    for _ in range(NEW_TOKENS):
        following = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], 1)
        if int(following) == 2:  # the end of a text
            break
    return ids[0]


def compiled_perplexity(model: Any, options: dict[str, Any]) -> float:
    compiled = fpcompiler.compile(model, NVFP4, example_kwargs=example(), target="cpu", **options)
    return perplexity(lambda ids: compiled(input_ids=ids).logits)


@torch.no_grad()
def perplexity(logits: Any) -> float:
    losses = metrics.token_losses(logits, smollm2.tokens(TOKENS))
    return round(float(losses.mean().exp()), 4)


if __name__ == "__main__":
    sys.exit(main())
