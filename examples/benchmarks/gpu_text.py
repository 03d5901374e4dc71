"""SmolLM2 on a GPU and on a CPU: whether both write the same text, token by token.

    python examples/benchmarks/gpu_text.py --compile-only smollm2.fpc  # anywhere, with the compiler
    python examples/benchmarks/gpu_text.py smollm2.fpc                 # on a machine with the GPU

One artifact has the plan for the CPU and the kernels for the GPU. Parts of an article are its
prompts, and the most likely token is taken each time. It is loaded with ``reproducible=True``, and
once more as usual. Where texts differ, the record has the place, and how far apart the two tokens
were for the CPU: ``sensitivity.py`` shows what the last bit of a number does to such a model. It
writes ``results/gpu_text.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from fpcompiler.runtime.model import CompiledModel

PROMPT = 64
"""Tokens of each article that are read."""


def prompts_of(artifact: Path) -> Path:
    """Return where the tokens of the prompts are: whoever runs it needs no tokenizer."""
    return artifact.with_suffix(".prompts.json")


def build(options: argparse.Namespace) -> None:
    """Compile the model, and keep the prompts beside it."""
    from examples.zoo import smollm2
    from fpcompiler.huggingface import CachedDecoder

    model = smollm2.load().to(getattr(torch, options.dtype))
    decoder = CachedDecoder(model, 1, PROMPT + options.tokens, last_logits=1)
    inputs = torch.arange(8)[None], torch.arange(8)
    fpcompiler.compile(decoder, options.scheme, example_inputs=inputs, target=options.target).save(
        options.artifact
    )
    tokens = smollm2.tokens(options.texts * PROMPT).reshape(options.texts, PROMPT)
    prompts_of(options.artifact).write_text(json.dumps(tokens.tolist()))


@torch.no_grad()
def generate(model: CompiledModel, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the tokens behind a prompt, and the logits that they were chosen by."""
    model.reset()
    tokens, position = prompt[None], torch.arange(len(prompt), device=prompt.device)
    found, logits = [], []
    for index in range(count):
        scores = model(tokens, position)[0, -1].float()
        tokens = scores.argmax().reshape(1, 1)
        position = torch.full((1,), len(prompt) + index, device=prompt.device)
        found.append(tokens[0, 0])
        logits.append(scores)
    return torch.stack(found).cpu(), torch.stack(logits).cpu()


def compare(cpu: CompiledModel, gpu: CompiledModel, prompt: Tensor, count: int) -> dict[str, Any]:
    """Return how long both texts are the same, and what the CPU said of the first other token."""
    expected, scores = generate(cpu, prompt, count)
    found, others = generate(gpu, prompt.cuda(), count)
    same = int((expected == found).long().cumprod(0).sum())
    row: dict[str, Any] = {"same_tokens": same, "largest_logit": float(scores[0].abs().max())}
    # Up to here both have read the same tokens.
    upto = min(same + 1, count)
    row["largest_difference"] = float((scores[:upto] - others[:upto]).abs().max())
    row["same_bits"] = torch.equal(scores, others)
    if same < count:
        row["cpu_prefers_its_token_by"] = float(
            scores[same, expected[same]] - scores[same, found[same]]
        )
    return row


def compared(
    options: argparse.Namespace, prompts: list[Tensor], same: bool
) -> list[dict[str, Any]]:
    """Return a row for each prompt, as models run usually or with the same bits everywhere."""
    cpu = fpcompiler.load(options.artifact, reproducible=same)
    gpu = fpcompiler.load(
        options.artifact, device="cuda", trust=True, strict=True, reproducible=same
    )
    rows = [compare(cpu, gpu, prompt, options.tokens) for prompt in prompts]
    for row in rows:
        print(row, flush=True)
    texts = sum(row["same_tokens"] == options.tokens for row in rows)
    how = "reproducible" if same else "as usual"
    print(
        f"{how}: {texts} of {len(rows)} texts of {options.tokens} tokens are the same", flush=True
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument("--scheme", default="w4a6-row")
    parser.add_argument("--target", nargs="+", default=["cpu", "sm_90a"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not options.compile_only and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --compile-only needs none.")
    if not options.artifact.exists():
        build(options)
    if options.compile_only:
        return
    prompts = [torch.tensor(x) for x in json.loads(prompts_of(options.artifact).read_text())]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "scheme": fpcompiler.load(options.artifact).scheme,
        "dtype": options.dtype,
        "prompt": PROMPT,
        "tokens": options.tokens,
        "reproducible": compared(options, prompts, True),
        "as_usual": compared(options, prompts, False),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "gpu_text.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
