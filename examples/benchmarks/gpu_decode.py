"""Generating text on a GPU: an artifact with and without CUDA graphs, and transformers in bf16.

The artifact is a language model with its KV cache (``fpcompiler.huggingface.CachedDecoder``) that
was compiled for this GPU too. Each runtime reads the same prompt and then chooses the most likely
token, one by one, without the host looking at it; all take turns, and medians are compared.
``fpcompiler-rest`` is the artifact with ``compile_rest()``. If transformers is installed and the
model is like Llama, its architecture is built with random weights in bf16, to run eagerly and under
torch.compile. Outputs of the two other rows of the artifact must be the same, bit for bit.

    python examples/benchmarks/gpu_decode.py model.fpc      # no compiler of models is needed

``random_llama.py`` makes such artifacts in the shape of LLaMA-3-8B. It writes
``results/gpu_decode-MODEL.json``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpcompiler.plan import Plan
from fpcompiler.runtime.loading import load

Step = Callable[[Tensor, Tensor], Tensor]
"""From tokens ``[batch, length]`` and their positions ``[length]`` to logits of the last token."""


class Runtime:
    """A way to run the model: it reads a prompt, then tokens one by one."""

    def __init__(self, step: Step, reset: Callable[[], None], nbytes: int) -> None:
        self.step, self.reset, self.nbytes = step, reset, nbytes

    def generate(self, prompt: Tensor, count: int) -> tuple[Tensor, float, float]:
        """Return the tokens, the seconds of the prompt, and those of the tokens behind it."""
        self.reset()
        length = prompt.shape[1]
        position = torch.arange(length, device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        token = self.step(prompt, position)[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        found = [token]
        for index in range(count):
            position = torch.full((1,), length + index, device="cuda")
            found.append(self.step(found[-1], position)[:, -1].argmax(-1, keepdim=True))
        torch.cuda.synchronize()
        return torch.cat(found, 1), middle - begin, time.perf_counter() - middle


def of_artifact(path: Path, graphs: bool, rest: bool = False) -> tuple[Runtime, Any]:
    before = torch.cuda.memory_allocated()
    model = load(path, device="cuda", trust=True, strict=True, graphs=graphs)
    if rest:
        model.compile_rest()
    return Runtime(model, model.reset, torch.cuda.memory_allocated() - before), model


def llama_fields(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the config of a model like Llama from its layers; empty if it is none."""
    caches = [tensors[key].shape for key in plan.state.values()]
    rows = {row.name.rpartition(".")[2]: row.shape for row in plan.layers}
    needed = ("q_proj", "k_proj", "gate_proj", "lm_head")
    if not caches or len(caches[0]) != 4 or not all(name in rows for name in needed):
        return {}
    _, kv_heads, positions, width = caches[0]
    return {
        "vocab_size": rows["lm_head"][0],
        "hidden_size": rows["q_proj"][1],
        "intermediate_size": rows["gate_proj"][0],
        "num_hidden_layers": sum(row.name.endswith(".q_proj") for row in plan.layers),
        "num_attention_heads": rows["q_proj"][0] // width,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "max_position_embeddings": positions,
    }


def of_transformers(
    fields: Mapping[str, int], batch: int, mode: str, compile_prompt: bool
) -> dict[str, Runtime]:
    """Return the same architecture in bf16, eagerly and compiled; random weights."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    before = torch.cuda.memory_allocated()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    torch.set_default_dtype(torch.float32)
    growing: dict[str, Any] = {}
    fixed = StaticCache(config=model.config, max_cache_len=fields["max_position_embeddings"])
    # The cache makes its tensors at the first call: inside of a recorded graph they would not last.
    model(torch.zeros(batch, 1, dtype=torch.int64, device="cuda"), past_key_values=fixed)
    fixed.reset()
    compiled = torch.compile(model, mode=mode, dynamic=False)

    def eager(tokens: Tensor, position: Tensor) -> Tensor:
        past = growing.setdefault("cache", DynamicCache(config=model.config))
        positions = position[None].expand(batch, -1)
        return model(tokens, position_ids=positions, past_key_values=past, logits_to_keep=1).logits

    def fixed_size(tokens: Tensor, position: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        run = compiled if compile_prompt or tokens.shape[1] == 1 else model
        positions = position[None].expand(batch, -1)
        return run(tokens, position_ids=positions, past_key_values=fixed, logits_to_keep=1).logits

    nbytes = torch.cuda.memory_allocated() - before
    return {
        "hf-eager-bf16": Runtime(eager, growing.clear, nbytes),
        "torch-compile-bf16": Runtime(fixed_size, fixed.reset, nbytes),
    }


def measure(
    runtimes: dict[str, Runtime], prompt: Tensor, count: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return the medians of each runtime; one that fails is left out with its error."""
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runtimes}
    for name, runtime in [*runtimes.items()]:
        begin = time.perf_counter()
        try:
            for _ in range(2):  # compiles, records
                runtime.generate(prompt, count)
            ready = time.perf_counter() - begin
            _, first, rest = runtime.generate(prompt, count)
            print(
                f"{name} is ready after {ready:.0f} s; at first its prompt takes "
                f"{first * 1e3:.2f} ms, a token {rest / count * 1e3:.3f} ms",
                flush=True,
            )
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[:1]}", flush=True)
            found[name] = {"error": str(error)[:500]}
            del runtimes[name]
    for _ in range(rounds):
        for name, runtime in runtimes.items():
            times[name].append(runtime.generate(prompt, count)[1:])
    for name, runtime in runtimes.items():
        first, rest = (statistics.median(column) for column in zip(*times[name], strict=True))
        found[name] = {
            "prompt_seconds": first,
            "decode_seconds": rest,
            "decode_tokens_per_second": count * len(prompt) / rest,
            "allocated_bytes": runtime.nbytes,
        }
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="a language model with its KV cache")
    parser.add_argument("--prompt", type=int, default=32, help="tokens that are read")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=7, help="texts of each runtime")
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile")
    parser.add_argument(
        "--compile-prompt", action="store_true", help="let torch.compile compile the prompt too"
    )
    parser.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="RUNTIME",
        help="such as torch-compile-bf16, which tunes 30 layers for more than 100 s",
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device.")
    begin = time.perf_counter()
    with_graphs, model = of_artifact(options.artifact, True)
    without, _ = of_artifact(options.artifact, False)
    runtimes = {"fpcompiler": with_graphs, "fpcompiler-steps": without}
    if "fpcompiler-rest" not in options.leave_out:
        runtimes["fpcompiler-rest"] = of_artifact(options.artifact, True, rest=True)[0]
    artifact = model.artifact
    fields = llama_fields(artifact.plan, artifact.tensors)
    batch = next(artifact.tensors[key].shape[0] for key in artifact.plan.state.values())
    if not fields or importlib.util.find_spec("transformers") is None:
        print("transformers is left out: not installed, or the model is not like Llama")
    else:
        runtimes.update(of_transformers(fields, batch, options.mode, options.compile_prompt))
    runtimes = {name: row for name, row in runtimes.items() if name not in options.leave_out}
    room = min((artifact.tensors[key].shape[2] for key in artifact.plan.state.values()), default=0)
    if options.prompt + options.tokens > room:
        raise SystemExit(f"The cache has {room} positions: choose fewer --prompt and --tokens.")
    generator = torch.Generator().manual_seed(0)
    words = fields.get("vocab_size", 90)
    prompt = torch.randint(0, words, (batch, options.prompt), generator=generator).to("cuda")
    texts = [runtime.generate(prompt, options.tokens)[0] for runtime in (with_graphs, without)]
    if not torch.equal(*texts):
        raise SystemExit("Replayed graphs and single steps give different tokens.")
    rows = measure(runtimes, prompt, options.tokens, options.rounds)
    _print(rows, options.tokens)
    for row in model.graphs:
        print(row)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "compile_mode": options.mode,
        "compile_prompt": options.compile_prompt,
        "artifact": options.artifact.name,
        "scheme": model.scheme,
        "architecture": fields,
        "batch": batch,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "graphs": [str(row) for row in model.graphs],
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"gpu_decode-{options.artifact.stem}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}; {time.perf_counter() - begin:.0f} s in all")


def _version(package: str) -> str | None:
    """Return that of an installed package."""
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def _print(rows: Mapping[str, Mapping[str, Any]], count: int) -> None:
    known = {name: row for name, row in rows.items() if "error" not in row}
    if not known:
        return
    first = next(iter(known.values()))
    base = known.get("hf-eager-bf16", first)["decode_tokens_per_second"]
    print(f"{'':28} {'tokens/s':>10} {'ms/token':>10} {'relative':>10} {'prompt ms':>10} {'MB':>8}")
    for name, row in known.items():
        rate = row["decode_tokens_per_second"]
        print(
            f"{name:28} {rate:10.1f} {1e3 * row['decode_seconds'] / count:10.3f} "
            f"{rate / base:9.2f}x {row['prompt_seconds'] * 1e3:10.2f} "
            f"{row['allocated_bytes'] / 1e6:8.0f}"
        )


if __name__ == "__main__":
    main()
