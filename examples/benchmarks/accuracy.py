"""What quantization costs: the metric of each model of the zoo under each scheme.

    python examples/benchmarks/accuracy.py --models smollm2 minilm --schemes w4a6 mxfp4

Each model is compiled and saved here, then loaded and run by a fresh process, which has neither the
model's class nor the compiler. One table per model is printed, and written with all raw values to
``results/accuracy-<model>.json`` beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.zoo import corpora
from examples.zoo.runs import RUNS
from examples.zoo.tasks import DINOv2, MiniLM, Part, SmolLM2, Task, Whisper
from fpcompiler.runtime.tables import CompareRow

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMES = ("w4a16", "w4a8", "w4a6", "w4a6-row", "w4a4", "nvfp4", "mxfp4")
MODELS = ("smollm2", "minilm", "dinov2", "whisper")


def task(name: str, options: argparse.Namespace) -> Task:
    if name == "smollm2":
        return SmolLM2(options.tokens)
    return (
        {"minilm": MiniLM, "dinov2": DINOv2}[name]()
        if name != "whisper"
        else Whisper(options.clips)
    )


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    for name in options.models:
        report = measure(task(name, options), options, console)
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"accuracy-{name}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        console.print(table(report))
        console.print(f"written to {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, help="names or exact texts")
    parser.add_argument("--tokens", type=int, default=1536, help="of the text for perplexity")
    parser.add_argument("--clips", type=Path, default=corpora.LIBRIVOX, help="folder of speech")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser.parse_args()


def measure(task: Task, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the report of one model: the fp32 metrics, and a row per scheme."""
    parts, inputs = task.parts(), task.inputs()
    start = time.perf_counter()
    reference = RUNS[task.name]({name: part.module for name, part in parts.items()}, inputs)
    fp32 = {"run_seconds": time.perf_counter() - start, "metrics": task.score(reference, reference)}
    rows = []
    for scheme in options.schemes:
        console.print(f"{task.name}: {scheme}")
        with tempfile.TemporaryDirectory() as folder:
            row, results = compile_and_run(task, parts, inputs, scheme, Path(folder), options)
        rows.append({**row, "metrics": task.score(results, reference)})
    return {
        "model": task.name,
        "protocol": task.protocol,
        "device": processor(),
        "threads": options.threads,
        "versions": {
            "python": platform.python_version(),
            "fpcompiler": fpcompiler.__version__,
            **{name: version(name) for name in ("torch", "torch-mlir", "transformers")},
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "fp32": fp32,
        "schemes": rows,
    }


def compile_and_run(
    task: Task,
    parts: dict[str, Part],
    inputs: dict[str, torch.Tensor],
    scheme: str,
    folder: Path,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Compile every part, run the artifacts in a fresh process; return a row and its results."""
    files, compiled_parts, compared = {}, [], []
    start = time.perf_counter()
    for name, part in parts.items():
        compiled = fpcompiler.compile(part.module, scheme, example_inputs=part.example)
        files[name] = folder / f"{name}.fpc"
        compiled.save(files[name])
        compiled_parts.append(compiled)
    seconds = time.perf_counter() - start
    for (name, part), compiled in zip(parts.items(), compiled_parts, strict=True):
        compared += [(name, row) for row in compiled.compare(part.module, [part.probe]).rows]
    save_file(inputs, folder / "inputs.safetensors")
    command = [sys.executable, "-m", "examples.zoo.runs", task.name]
    command += [str(folder / "inputs.safetensors"), str(folder / "results.safetensors")]
    command += [f"{name}={file}" for name, file in files.items()]
    command += ["--threads", str(options.threads)]
    process = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    row = {
        "scheme": scheme,
        "exact": compiled_parts[0].scheme,
        "compile_seconds": seconds,
        "fresh_process": json.loads(process.stdout),
        "artifact_bytes": sum(file.stat().st_size for file in files.values()),
        **weights([row for compiled in compiled_parts for row in compiled.plan().rows]),
        **distances(compared),
    }
    return row, load_file(folder / "results.safetensors")


def weights(rows: list[Any]) -> dict[str, Any]:
    """Return how many layers are quantized, and their bytes beside those of bf16."""
    quantized = [row for row in rows if row.quantized]
    in_bf16 = sum(2 * row.shape[0] * row.shape[1] for row in quantized)
    return {
        "layers": len(rows),
        "quantized_layers": len(quantized),
        "quantized_bytes": sum(row.bytes_after for row in quantized),
        "quantized_bytes_ratio_to_bf16": sum(row.bytes_after for row in quantized) / in_bf16,
    }


def distances(compared: list[tuple[str, CompareRow]]) -> dict[str, Any]:
    """Return the SQNR of each layer and output against the eager fp32 model."""
    found = [
        {"part": part, "name": row.name, "kind": row.kind, "sqnr_db": row.sqnr_db}
        for part, row in compared
        if row.sqnr_db is not None and row.sqnr_db != float("inf")
    ]
    layers = [row["sqnr_db"] for row in found if row["kind"] == "layer"]
    return {
        "layer_sqnr_db_median": statistics.median(layers),
        "layer_sqnr_db_least": min(layers),
        "sqnr_db": found,
    }


def table(report: dict[str, Any]) -> Table:
    """Return the table of one model."""
    names = list(report["fp32"]["metrics"])
    result = Table("scheme", *names, title=f"{report['model']}: {report['protocol']}")
    for column in ("SQNR dB median", "least", "quantized", "x bf16", "MB", "run s"):
        result.add_column(column, justify="right")
    values = [f"{value:.4g}" for value in report["fp32"]["metrics"].values()]
    seconds = f"{report['fp32']['run_seconds']:.1f}"
    result.add_row("fp32", *values, "", "", "", "", "", seconds)
    for row in report["schemes"]:
        result.add_row(
            row["scheme"],
            *(f"{row['metrics'][name]:.4g}" for name in names),
            f"{row['layer_sqnr_db_median']:.1f}",
            f"{row['layer_sqnr_db_least']:.1f}",
            f"{row['quantized_layers']}/{row['layers']}",
            f"{row['quantized_bytes_ratio_to_bf16']:.3f}",
            f"{row['artifact_bytes'] / 1e6:.1f}",
            f"{row['fresh_process']['run_seconds']:.1f}",
        )
    return result


def processor() -> str:
    """Return the name of the processor and how many of it there are."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
