"""What the methods of ``compile`` recover: the metric of each model, by scheme and method.

    python examples/benchmarks/methods.py --models smollm2 --rows w4a4:rtn w4a4:rotate-gptq

Each row is a scheme and a method (or the text of the passes between ``insert-quantize`` and
``quantize-weights``). Calibration data are never those of the metric; see examples/zoo. One table
per model is printed, and written with all raw values to ``results/methods-<model>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.accuracy import MODELS, processor, task
from examples.benchmarks.rows import MEASURED
from examples.zoo import corpora
from examples.zoo.runs import RUNS
from examples.zoo.tasks import Part, Task
from fpcompiler.passes import METHODS, default_pipeline, parse_pipeline, pipeline_text
from fpcompiler.scheme import Scheme

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = tuple(f"{scheme}:{method}" for scheme, methods in MEASURED.items() for method in methods)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for name in options.models:
        file = options.out / f"methods-{name}.json"
        report = run(task(name, options), options, file, console)
        console.print(table(report))
        console.print(f"written to {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="SCHEME:METHOD")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text for perplexity")
    parser.add_argument("--clips", type=Path, default=corpora.LIBRIVOX, help="folder of speech")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="keep the rows that are recorded")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser.parse_args()


def run(task: Task, options: argparse.Namespace, file: Path, console: Console) -> dict[str, Any]:
    """Measure every row; the file is written after each, so that nothing is lost."""
    parts, inputs = task.parts(), task.inputs()
    data = task.calibration(parts)
    with torch.no_grad():
        reference = RUNS[task.name]({name: part.module for name, part in parts.items()}, inputs)
    report: dict[str, Any] = {
        "model": task.name,
        "protocol": task.protocol,
        "calibration": {part: shapes(batches) for part, batches in data.items()},
        "device": processor(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "torch-mlir", "transformers")},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "fp32": task.score(reference, reference),
        "rows": [],
    }
    if options.add and file.exists():
        report["rows"] = json.loads(file.read_text())["rows"]
    for text in options.rows:
        row = measure(task, parts, inputs, data, reference, text)
        kept = [r for r in report["rows"] if (r["scheme"], r["method"]) != text_of(row)]
        report["rows"] = [*kept, row]
        file.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"{task.name} {text}: {row['metrics']} in {row['compile_seconds']:.0f} s")
    return report


def text_of(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["scheme"], row["method"]


def measure(
    task: Task,
    parts: Mapping[str, Part],
    inputs: dict[str, torch.Tensor],
    data: Mapping[str, list[Any]],
    reference: Mapping[str, torch.Tensor],
    text: str,
) -> dict[str, Any]:
    """Compile every part with a scheme and a method, and run it."""
    scheme, method = text.rpartition(":")[::2]
    start, programs = time.perf_counter(), {}
    for name, part in parts.items():
        programs[name] = fpcompiler.compile(
            part.module,
            scheme,
            example_inputs=part.example,
            calibration=data[name],
            pipeline=pipeline(scheme, method),
        )
    seconds = time.perf_counter() - start
    results = RUNS[task.name](programs, inputs)
    rows = [row for program in programs.values() for row in program.plan().rows if row.quantized]
    return {
        "scheme": scheme,
        "method": method,
        "pipeline": pipeline(scheme, method),
        "compile_seconds": seconds,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "quantized_bytes_ratio_to_bf16": sum(row.bytes_after for row in rows)
        / sum(2 * row.shape[0] * row.shape[1] for row in rows),
        "metrics": task.score(results, reference),
    }


def pipeline(scheme: str, method: str) -> str:
    """Return the passes of a method, or those that a text names in its place."""
    exact = str(Scheme.of(scheme))
    if method in METHODS:
        return pipeline_text(default_pipeline(exact, method=method))
    passes = default_pipeline(exact)
    where = next(i for i, item in enumerate(passes) if item.name == "quantize-weights")
    return pipeline_text((*passes[:where], *parse_pipeline(method), *passes[where:]))


def shapes(batches: list[Any]) -> str:
    first = [list(tensor.shape) for tensor in batches[0]]
    return f"{len(batches)} batches such as {first}"


def table(report: Mapping[str, Any]) -> Table:
    result = Table(title=f"{report['model']}: {report['protocol']}")
    names = list(report["fp32"])
    for name in ("scheme", "method", *names, "of bf16", "compile s"):
        result.add_column(name, justify="left" if name in ("scheme", "method") else "right")
    result.add_row("fp32", "", *(f"{report['fp32'][name]:.4g}" for name in names), "", "")
    for row in report["rows"]:
        metrics = (f"{row['metrics'][name]:.4g}" for name in names)
        size = f"{row['quantized_bytes_ratio_to_bf16']:.3f}"
        result.add_row(
            row["scheme"], row["method"], *metrics, size, f"{row['compile_seconds']:.0f}"
        )
    return result


if __name__ == "__main__":
    main()
