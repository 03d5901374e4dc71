"""What each model of the zoo computes for its metric, eager or compiled.

This module needs no model class, no tokenizer and no transformers, so that a fresh process can run
it on artifacts alone::

    python -m examples.zoo.runs smollm2 inputs.safetensors results.safetensors model=model.fpc
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.zoo import metrics

Parts: TypeAlias = Mapping[str, Callable[..., Any]]
"""The programs that make up a model, by name: eager modules or compiled models."""

Tensors: TypeAlias = Mapping[str, Tensor]

LONGEST_TRANSCRIPT = 64


def run_smollm2(parts: Parts, inputs: Tensors) -> dict[str, Tensor]:
    """Return the negative log-likelihood of each predicted token of a text [tokens]."""
    return {"losses": metrics.token_losses(lambda ids: parts["model"](ids).logits, inputs["ids"])}


def run_minilm(parts: Parts, inputs: Tensors) -> dict[str, Tensor]:
    """Return the unit vectors of texts, given as token ids and masks [texts, tokens]."""
    vectors = []
    for ids, mask in zip(inputs["ids"].split(10), inputs["mask"].split(10), strict=True):
        longest = int(mask.sum(1).max())
        vectors.append(
            metrics.sentence_vectors(
                lambda ids, mask: parts["model"](ids, mask).last_hidden_state,
                ids[:, :longest].contiguous(),
                mask[:, :longest].contiguous(),
            )
        )
    return {"vectors": torch.cat(vectors)}


@torch.no_grad()
def run_dinov2(parts: Parts, inputs: Tensors) -> dict[str, Tensor]:
    """Return the patch tokens and the saliency of pixels [images, 3, height, width]."""
    tokens, saliency = parts["model"](inputs["pixels"])
    return {"tokens": tokens.contiguous(), "saliency": saliency.contiguous()}


@torch.no_grad()
def run_whisper(parts: Parts, inputs: Tensors) -> dict[str, Tensor]:
    """Return the transcripts [clips, 64], filled up with ``end``, of features [clips, 80, 3000]."""
    end = int(inputs["end"])
    transcripts = []
    for features in inputs["features"].split(1):
        states = parts["encoder"](features)
        ids = metrics.transcribe_greedy(
            parts["decoder"], states, inputs["start"], end, inputs["special"], LONGEST_TRANSCRIPT
        )
        transcripts.append(nnf.pad(ids, (0, LONGEST_TRANSCRIPT - len(ids)), value=end))
    return {"transcripts": torch.stack(transcripts)}


RUNS: dict[str, Callable[[Parts, Tensors], dict[str, Tensor]]] = {
    "smollm2": run_smollm2,
    "minilm": run_minilm,
    "dinov2": run_dinov2,
    "whisper": run_whisper,
}
"""By name of the model."""


def peak_memory() -> int:
    """Return the largest resident memory of this process, in bytes."""
    # Not ru_maxrss: that begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    """Run artifacts on recorded inputs; print seconds, peak memory and what was imported."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", choices=RUNS)
    parser.add_argument("inputs", help="safetensors file to read")
    parser.add_argument("results", help="safetensors file to write")
    parser.add_argument("parts", nargs="+", metavar="name=file.fpc")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    import fpcompiler

    files = dict(part.split("=", 1) for part in options.parts)
    inputs = load_file(options.inputs)
    start = time.perf_counter()
    parts = {name: fpcompiler.load(file) for name, file in files.items()}
    loaded = time.perf_counter()
    save_file(RUNS[options.model](parts, inputs), options.results)
    compiler = ("torch_mlir", "transformers", "fpcompiler.ir", "fpcompiler.passes")
    report = {
        "load_seconds": loaded - start,
        "run_seconds": time.perf_counter() - loaded,
        "peak_memory_bytes": peak_memory(),
        "imported": [name for name in compiler if name in sys.modules],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
