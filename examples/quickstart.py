"""Compile a real language model to FP4 weights and FP6 activations, and see what that does to it.

    python examples/quickstart.py            # the same as: make demo

The model is SmolLM2-135M-Instruct. It is compiled with dumps of every pass, saved as one file, and
run from that file in a new process, which knows neither the model's code nor the compiler. Nothing
is calibrated: weights and activations are rounded to nearest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Threads of torch that wait for each other must sleep. By default they spin, and when something
# else runs on one of two cores, the work here takes up to twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

import fpcompiler
from examples import console, new_process
from examples.zoo import metrics

QUESTION = "Why is the sky blue? Answer in one sentence."
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
END = 2  # <|im_end|>
COMPILER_MODULES = (
    "torch_mlir", "transformers", "gguf", "tokenizers",
    "fpcompiler.capture", "fpcompiler.ir", "fpcompiler.passes", "fpcompiler.scheme",
)  # fmt: skip
SHOWN_LAYERS = 8


@dataclass(frozen=True)
class Measured:
    """What is measured of the eager and of the compiled model alike."""

    perplexity: float
    sentence: list[int]
    perplexity_seconds: float
    sentence_seconds: float


@torch.no_grad()
def measure(forward: metrics.Forward, ids: Tensor, prompt: Tensor, count: int) -> Measured:
    """Return the perplexity of ``ids``, and ``prompt`` with the ``count`` likeliest tokens."""
    start = time.perf_counter()
    perplexity = metrics.perplexity(forward, ids)
    middle = time.perf_counter()
    sentence = metrics.generate_greedy(forward, prompt, count)
    end = time.perf_counter()
    return Measured(perplexity, sentence.tolist(), middle - start, end - middle)


def in_new_process(artifact: str) -> int:
    """Measure an artifact: what to run comes in as JSON, what was measured goes out as JSON."""
    task = json.load(sys.stdin)
    model = fpcompiler.load(artifact)
    ids, prompt = torch.tensor(task["ids"]), torch.tensor(task["prompt"])
    measured = measure(lambda window: model(window).logits, ids, prompt, task["count"])
    imported = [name for name in COMPILER_MODULES if name in sys.modules]
    print(json.dumps({"measured": asdict(measured), "imported": imported}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="256 tokens, no dumps")
    parser.add_argument("--in-new-process", metavar="ARTIFACT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_new_process:
        return in_new_process(options.in_new_process)
    return demonstrate(options.scheme, options.folder, options.quick)


def demonstrate(scheme: str, folder: Path, quick: bool) -> int:
    """Compile, save and run the model; return the exit code."""
    started = time.perf_counter()
    tokens, count = (256, 4) if quick else (1536, 32)
    console.heading(f"SmolLM2-135M, a LLaMA of 30 layers, compiled to {scheme}")
    with console.step(f"load the model and {tokens:,} tokens of Wikipedia"):
        with console.required():
            from examples.zoo import smollm2
        model, words = smollm2.load(), smollm2.tokenizer()
        ids, prompt = smollm2.tokens(tokens), torch.tensor(words.encode(PROMPT).ids)

    def eager(window: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=window, use_cache=False).logits
        return logits

    with console.step("measure it as it is, in fp32"):
        before = measure(eager, ids, prompt, count)
    dumps, path = folder / "dumps", console.artifact(folder, "smollm2", scheme)
    with console.step(
        f"compile it to {scheme}" + ("" if quick else ", with dumps of every pass")
    ) as track:
        compiled = fpcompiler.compile(
            model, scheme, example_inputs=(ids[:128].reshape(2, 64),),
            dump_dir=None if quick else dumps, progress=track,
        )  # fmt: skip
        compiled.save(path)
    with console.step(f"run {path} in a new process"):
        task = {"ids": ids.tolist(), "prompt": prompt.tolist(), "count": count}
        command = [str(Path(__file__).resolve()), "--in-new-process", str(path.absolute())]
        result = json.loads(new_process.run(command, json.dumps(task)))
        after = Measured(**result["measured"])
    with console.step(f"fpcompiler verify {path}"):
        report = fpcompiler.load(path).verify()

    if not quick:
        show_passes(dumps)
    show_plan(compiled)
    show_result(before, after, len(ids), console.bytes_before_and_after(model, path))
    show_answers(words, before.sentence, after.sentence, len(prompt))
    imported = ", ".join(result["imported"]) or "no compiler, no torch-mlir, no transformers"
    console.note(f"The new process imported {imported}.", "dim")
    console.heading("fpcompiler verify")
    console.table(("check", "result", "detail"), [list(asdict(r).values()) for r in report.rows], 3)
    show_files(path, None if quick else dumps)
    console.out.print(f"\n  {time.perf_counter() - started:.0f} s in total")
    return 0 if report.ok else 1


def show_passes(dumps: Path) -> None:
    numerics = json.loads((dumps / "numerics.json").read_text())
    timing = json.loads((dumps / "timing.json").read_text())
    seconds = [f"{row['seconds'] + row['verify_seconds']:.2f}" for row in timing]
    rows = []
    for row in numerics["passes"]:
        number = int(row["after"].partition("-")[0])
        layers = {k: v for k, v in row["layers_sqnr_db"].items() if v is not None}
        logits = [v for v in row["outputs_sqnr_db"] if v is not None]
        rows.append(
            (
                row["after"],
                seconds[number - 1],
                f"{min(logits):.1f} dB" if logits else "bit-equal",
                f"{statistics.median(layers.values()):.1f} dB" if layers else "bit-equal",
                f"{min(layers.values()):.1f} dB" if layers else "bit-equal",
            )
        )
    console.heading("What each pass did to the numbers: signal to noise, against the model")
    console.table(("after pass", "seconds", "logits", "median layer", "worst layer"), rows)


def show_plan(compiled: fpcompiler.CompiledModel) -> None:
    plan = compiled.plan()
    quantized = [row for row in plan.rows if row.quantized]
    first = plan.rows[:SHOWN_LAYERS]
    kept = [row for row in plan.rows[SHOWN_LAYERS:] if not row.quantized]
    rows = [
        (
            row.name.removeprefix("model."),
            "x".join(map(str, row.shape)),
            format_name(row.weight),
            format_name(row.activation),
            mebibytes(row.bytes_before),
            mebibytes(row.bytes_after),
        )
        for row in (*first, *kept)
    ]
    more = len(plan.rows) - len(rows)
    rows.insert(len(first), (f"({more} more)", "", "", "", "", ""))
    before = sum(row.bytes_before for row in quantized)
    after = sum(row.bytes_after for row in quantized)
    sizes = mebibytes(before), mebibytes(after)
    rows.append((f"{len(quantized)} quantized layers", "", "", "", *sizes))
    console.heading("The plan")
    console.note(compiled.scheme.partition(",skip=")[0], "dim")
    console.table(("layer", "shape", "weights", "inputs", "MiB", "after"), rows, 4)
    console.note(
        f"With their scales the quantized layers take {after / before:.3f} of their bytes in fp32, "
        f"{2 * after / before:.3f} of bf16. The embedding, which is the output head too, stays in "
        "fp32."
    )


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"


def format_name(operand: str) -> str:
    """Return the short name of the format in the text of an operand: E2M1."""
    name = operand.partition("@")[0]
    return fpcompiler.FORMATS[name].short if name in fpcompiler.FORMATS else name


def show_result(before: Measured, after: Measured, tokens: int, sizes: tuple[str, str]) -> None:
    def seconds(name: str) -> tuple[str, str]:
        first, second = (getattr(measured, f"{name}_seconds") for measured in (before, after))
        return f"{first:.1f}", f"{second:.1f}"

    perplexities = f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"
    console.heading("Before and after")
    console.table(
        ("", "fp32, eager", "compiled, new process"),
        [
            (f"perplexity of {tokens:,} tokens", *perplexities),
            ("bytes of the model", *sizes),
            ("seconds for the perplexity", *seconds("perplexity")),
            ("seconds for the answer", *seconds("sentence")),
        ],
    )
    console.note(
        "Weights and activations are rounded to nearest, without calibration. Quantized layers "
        "run in the native library; without it PyTorch decodes them, which is slow."
    )


def show_answers(words: Any, before: list[int], after: list[int], start: int) -> None:
    console.heading(f"An answer to: {QUESTION}")
    rows = []
    for name, ids in (("fp32", before), ("compiled", after)):
        answer = ids[start:]
        answer = answer[: answer.index(END)] if END in answer else answer
        rows.append((name, " ".join(words.decode(answer).split())))
    console.labelled(rows)
    console.note("Always the likeliest token; for each one the whole text is run again.", "dim")


def show_files(path: Path, dumps: Path | None) -> None:
    console.heading("What there is to look at")
    command = console.cli()
    lines = [
        (f"{path}", "the compiled model"),
        (f"{command} inspect {path}", "the whole plan, with reasons"),
        (f"{command} verify {path}", "checksums, shapes, scales, a replayed call"),
    ]
    if dumps:
        lines += [
            (f"{dumps}/", "the program after each pass, as MLIR"),
            (f"{dumps}/04-insert-quantize.diff", "what one pass changed"),
            (f"{dumps}/numerics.json", "what each pass did to each layer"),
        ]
    width = max(len(what) for what, _ in lines) + 2
    for what, why in lines:
        console.out.print(f"  {what:<{width}}[dim]{why}[/]", soft_wrap=True)


if __name__ == "__main__":
    console.exit_with(main)
