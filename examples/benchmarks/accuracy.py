"""What quantization costs: the metric of each model of the zoo under each scheme.

    python examples/benchmarks/accuracy.py --models smollm2 minilm --schemes w4a6 mxfp4

Each model is compiled and saved here, then loaded and run by a fresh process, which has neither the
model's class nor the compiler. One table per model is printed, and written with all raw values to
``results/accuracy-<model>.json`` beside this file. ``--simulate`` adds what an independent
simulation in eager torch gives (tests/e2e/rtn_simulation.py), with the same layers quantized.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.zoo import corpora
from examples.zoo.runs import RUNS
from examples.zoo.tasks import DINOv2, MiniLM, Part, SmolLM2, Task, Whisper
from fpcompiler.plan import LayerRow
from fpcompiler.runtime.tables import CompareRow
from fpcompiler.scheme import Scheme

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMES = {
    **{name: name for name in ("w4a16", "w4a8", "w4a6", "w4a6-row", "w4a4", "nvfp4", "mxfp4")},
    "W block32": "w=f4E2M1FN@block32:f32,a=none",
    "W row": "w=f4E2M1FN@row:f32,a=none",
    "W4A4 block32": "w=f4E2M1FN@block32:f32,a=f4E2M1FN@block32:f32",
    "W4A4 row/token": "w4a4-row",
    "W row, A4 tensor": "w=f4E2M1FN@row:f32,a=f4E2M1FN@tensor:f32",
}
"""What is measured by default: the named schemes, then plain ones with real scales."""
MODELS = ("smollm2", "minilm", "dinov2", "whisper")


def task(name: str, options: argparse.Namespace) -> Task:
    tasks = {
        "smollm2": lambda: SmolLM2(options.tokens),
        "minilm": MiniLM,
        "dinov2": DINOv2,
        "whisper": lambda: Whisper(options.clips),
    }
    return tasks[name]()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for name in options.models:
        file = options.out / f"accuracy-{name}.json"
        for report in reports(task(name, options), options):
            file.write_text(json.dumps(report, indent=1) + "\n")
            console.print(f"{name}: {report['schemes'][-1]['name']}")
        console.print(table(report))
        console.print(f"written to {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help="names or exact texts")
    parser.add_argument("--simulate", action="store_true", help="add the eager simulation")
    parser.add_argument("--tokens", type=int, default=1536, help="of the text for perplexity")
    parser.add_argument("--clips", type=Path, default=corpora.LIBRIVOX, help="folder of speech")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser.parse_args()


def reports(task: Task, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the report of one model after each scheme: the fp32 metrics, and a row per scheme."""
    parts, inputs = task.parts(), task.inputs()
    start = time.perf_counter()
    reference = RUNS[task.name]({name: part.module for name, part in parts.items()}, inputs)
    seconds = time.perf_counter() - start
    report = {
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
        "fp32": {"run_seconds": seconds, "metrics": task.score(reference, reference)},
        "schemes": [],
    }
    for name in options.schemes:
        scheme = SCHEMES.get(name, name)
        with tempfile.TemporaryDirectory() as folder:
            row, results = compile_and_run(task, parts, inputs, scheme, Path(folder), options)
        row = {"name": name, **row, "metrics": task.score(results, reference)}
        if options.simulate:
            simulated = simulate(task, parts, inputs, scheme, row["kept_layers"])
            row["simulation"] = task.score(simulated, reference)
        report["schemes"].append(row)
        yield report


def simulate(
    task: Task,
    parts: Mapping[str, Part],
    inputs: dict[str, torch.Tensor],
    scheme: str,
    kept: dict[str, list[str]],
) -> dict[str, torch.Tensor]:
    """Run the eager simulation, with the layers in high precision that the compiler kept."""
    from tests.e2e.rtn_simulation import quantize_model

    layer = Scheme.parse(scheme).base
    texts = str(layer.weight), str(layer.activation or "")
    models = {
        name: quantize_model(part.module, *texts, skip=tuple(kept[name]))
        for name, part in parts.items()
    }
    return RUNS[task.name](models, inputs)


def compile_and_run(
    task: Task,
    parts: Mapping[str, Part],
    inputs: dict[str, torch.Tensor],
    scheme: str,
    folder: Path,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Compile every part, run the artifacts in a fresh process; return a row and its results."""
    programs, compared = {}, []
    start = time.perf_counter()
    for name, part in parts.items():
        programs[name] = fpcompiler.compile(part.module, scheme, example_inputs=part.example)
        programs[name].save(folder / f"{name}.fpc")
    seconds = time.perf_counter() - start
    for name, part in parts.items():
        rows = programs[name].compare(part.module, [part.probe]).rows
        compared += [(name, row) for row in rows]
    plans = {name: program.plan().rows for name, program in programs.items()}
    row = {
        "exact": next(iter(programs.values())).scheme,
        "compile_seconds": seconds,
        "fresh_process": run_in_fresh_process(task.name, list(parts), inputs, folder, options),
        "artifact_bytes": sum(file.stat().st_size for file in folder.glob("*.fpc")),
        "kept_layers": {
            name: [row.name for row in rows if not row.quantized] for name, rows in plans.items()
        },
        **weights([row for rows in plans.values() for row in rows]),
        **distances(compared),
    }
    return row, load_file(folder / "results.safetensors")


def run_in_fresh_process(
    model: str,
    parts: list[str],
    inputs: dict[str, torch.Tensor],
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run the artifacts of a folder; the results are written there too."""
    save_file(inputs, folder / "inputs.safetensors")
    command = [sys.executable, "-m", "examples.zoo.runs", model]
    command += [str(folder / "inputs.safetensors"), str(folder / "results.safetensors")]
    command += [f"{name}={folder / name}.fpc" for name in parts]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def weights(rows: list[LayerRow]) -> dict[str, Any]:
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
    found: dict[str, dict[str, float]] = {"layer": {}, "output": {}}
    for part, row in compared:
        if row.sqnr_db is not None and math.isfinite(row.sqnr_db):
            found[row.kind][f"{part}: {row.name}"] = round(row.sqnr_db, 3)
    layers = found["layer"].values()
    return {
        "layer_sqnr_db_median": statistics.median(layers),
        "layer_sqnr_db_least": min(layers),
        "layer_sqnr_db": found["layer"],
        "output_sqnr_db": found["output"],
    }


def table(report: dict[str, Any]) -> Table:
    """Return the table of one model; in brackets what the simulation gives."""
    names = list(report["fp32"]["metrics"])
    title = f"{report['model']}: {report['protocol']}"
    result = Table("scheme", box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in (*names, "SQNR dB", "least", "layers", "x bf16", "MB", "run s"):
        result.add_column(column, justify="right")
    values = [f"{value:.4g}" for value in report["fp32"]["metrics"].values()]
    result.add_row("fp32", *values, *[""] * 5, f"{report['fp32']['run_seconds']:.1f}")
    for row in report["schemes"]:
        result.add_row(
            row["name"],
            *(metric_text(row, name) for name in names),
            f"{row['layer_sqnr_db_median']:.1f}",
            f"{row['layer_sqnr_db_least']:.1f}",
            f"{row['quantized_layers']}/{row['layers']}",
            f"{row['quantized_bytes_ratio_to_bf16']:.3f}",
            f"{row['artifact_bytes'] / 1e6:.1f}",
            f"{row['fresh_process']['run_seconds']:.1f}",
        )
    return result


def metric_text(row: dict[str, Any], name: str) -> str:
    simulated = f" ({row['simulation'][name]:.4g})" if "simulation" in row else ""
    return f"{row['metrics'][name]:.4g}{simulated}"


def processor() -> str:
    """Return the name of the processor and how many of it there are."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
