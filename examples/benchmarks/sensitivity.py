"""What the last bit of a number does to a quantized model: SmolLM2, its embeddings changed by 2e-7.

Two machines that order a sum otherwise differ by about as much. Where activations are rounded to a
few bits, a value that is moved across a middle gets another code, which moves others: a change that
nobody could see in fp32 is large in the logits. So texts of a CPU and a GPU differ, unless both
compute the same bits (``load(..., reproducible=True)``).

    python examples/benchmarks/sensitivity.py     # three minutes

It writes ``results/sensitivity.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.accuracy import processor
from examples.zoo import smollm2

CHANGE = 2e-7
SCHEMES = ("w4a16", "w4a8-row", "w4a6-row", "w4a4-row")
PROMPT = 64


class LastLogits(nn.Module):
    """The logits behind a text."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        self.model = smollm2.load()
        if changed:
            weight = self.model.model.embed_tokens.weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            # The head keeps its own.
            changed_weight = nn.Parameter(weight.detach() * (1 + CHANGE * noise))
            self.model.model.embed_tokens.weight = changed_weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[1, vocabulary]`` behind ``[1, PROMPT]``."""
        found: Tensor = self.model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        return found


@torch.no_grad()
def logits_of(scheme: str | None, prompts: Tensor) -> list[Tensor]:
    """Return the logits behind each prompt, of the model as it is and of the changed one."""
    found = []
    for changed in (False, True):
        model: Any = LastLogits(changed)
        if scheme is not None:
            model = fpcompiler.compile(model, scheme, example_inputs=(prompts[:1],), target="cpu")
        found.append(torch.cat([model(prompt[None]) for prompt in prompts]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    prompts = smollm2.tokens(options.texts * PROMPT).reshape(options.texts, PROMPT)
    with torch.no_grad():
        exact = torch.cat([LastLogits(False)(prompt[None]) for prompt in prompts])
    rows = []
    for scheme in (None, *options.schemes):
        own, changed = logits_of(scheme, prompts)
        row = {
            "scheme": scheme or "not quantized",
            "change": (own - changed).square().mean().sqrt().item(),
            "largest_change": (own - changed).abs().max().item(),
            "other_tokens": int((own.argmax(1) != changed.argmax(1)).sum()),
            "quantization_error": (own - exact).square().mean().sqrt().item(),
        }
        print(row, flush=True)
        rows.append(row)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": processor(),
        "torch": torch.__version__,
        "changed_by": CHANGE,
        "texts": options.texts,
        "logits_std": exact.std().item(),
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "sensitivity.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
