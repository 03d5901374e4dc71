"""What a budget of bits buys when it is spent where it helps: ``compile(effective_bits=...)``.

    python examples/benchmarks/mixed.py --models minilm --bits 4.5 5 5.5 6.25

For each budget: formats chosen by ``mixed-formats`` (``sensitivity=fisher``, the default, and
``mse``), and 6 bits for layers drawn at random until the budget is spent. All are rounded to
nearest. ``fisher-given`` chooses widths only: layers that stay in 4 bits keep the scheme's E2M1,
as they do in the random rows. Beside the metric stands what ``fisher`` predicts: how much of the
model's outputs is noise, on a batch that it has not seen (SQNR, the first output). Calibration
data are never those of the metric; see examples/zoo. Everything is written to
``results/mixed-<model>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.accuracy import processor, task
from examples.benchmarks.methods import RESULTS, pipeline, shapes
from examples.zoo import corpora
from examples.zoo.runs import RUNS
from examples.zoo.tasks import Part, Task
from fpcompiler.operand import Operand
from fpcompiler.plan import LayerRow
from fpcompiler.scheme import Scheme

MODELS = ("minilm", "smollm2", "dinov2")
CHOICES = {
    "fisher": "mixed-formats{{effective_bits={bits}}}",
    "fisher-given": "mixed-formats{{effective_bits={bits} formats=given}}",
    "mse-given": "mixed-formats{{effective_bits={bits} sensitivity=mse formats=given}}",
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for name in options.models:
        file = options.out / f"mixed-{name}.json"
        with tempfile.TemporaryDirectory() as folder:
            report = _Bench(task(name, options), options, Path(folder)).run(file, console)
        console.print(table(report))
        console.print(f"written to {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:1])
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--bits", nargs="+", type=float, default=[4.5, 5.0, 5.5, 6.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=4096, help="of the text for perplexity")
    parser.add_argument("--clips", type=Path, default=corpora.LIBRIVOX, help="folder of speech")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser.parse_args()


class _Bench:
    """One model, its data and what the fp32 model gives.

    Args:
        task: The model with its metric.
        options: Of the command line.
        folder: Calibration keeps its work there, which budgets share.
    """

    def __init__(self, task: Task, options: argparse.Namespace, folder: Path) -> None:
        self.task = task
        self.options = options
        self.folder = folder
        parts = task.parts()
        (self.name,) = parts
        self.part: Part = parts[self.name]
        self.inputs = task.inputs()
        self.data = task.calibration(parts)[self.name]
        with torch.no_grad():
            self.reference = RUNS[task.name]({self.name: self.part.module}, self.inputs)

    def run(self, file: Path, console: Console) -> dict[str, Any]:
        """Measure every row; the file is written after each, so that nothing is lost."""
        report: dict[str, Any] = {
            "model": self.task.name,
            "protocol": self.task.protocol,
            "calibration": shapes(self.data),
            "device": processor(),
            "threads": self.options.threads,
            "versions": {name: version(name) for name in ("torch", "torch-mlir", "transformers")},
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "fp32": self.task.score(self.reference, self.reference),
            "scheme": self.options.scheme,
            "rows": [],
        }
        plain, rows = self.measure(self.options.scheme, "rtn", None)
        report["rows"].append(plain)
        for bits in self.options.bits:
            for choice, text in CHOICES.items():
                passes = text.format(bits=bits)
                row, _ = self.measure(self.options.scheme, choice, bits, passes)
                report["rows"].append(row)
            for seed in self.options.seeds:
                scheme = wider(self.options.scheme, rows, bits, seed)
                row, _ = self.measure(scheme, f"random-{seed}", bits)
                report["rows"].append(row)
            file.write_text(json.dumps(report, indent=1) + "\n")
            for row in report["rows"][-len(CHOICES) - len(self.options.seeds) :]:
                console.print(
                    f"{bits} {row['choice']}: {row['bits']:.3f} {row['metrics']} "
                    f"{row['output_sqnr_db']}"
                )
        return report

    def measure(
        self, scheme: str, choice: str, budget: float | None, passes: str = "rtn"
    ) -> tuple[dict[str, Any], Sequence[LayerRow]]:
        """Compile with a scheme and passes, and run the task."""
        start = time.perf_counter()
        program = fpcompiler.compile(
            self.part.module,
            scheme,
            example_inputs=self.part.example,
            calibration=self.data,
            pipeline=pipeline(scheme, passes),
            work_dir=self.folder,
        )
        seconds = time.perf_counter() - start
        results = RUNS[self.task.name]({self.name: program}, self.inputs)
        rows = [row for row in program.plan().rows if row.quantized]
        formats = Counter(Operand.parse(row.weight).format.short for row in rows)
        layers = program.compare(self.part.module, [self.part.probe]).rows
        row = {
            "choice": choice,
            "budget": budget,
            "bits": bits_of(rows),
            "formats": dict(sorted(formats.items())),
            "compile_seconds": seconds,
            "metrics": self.task.score(results, self.reference),
            "output_sqnr_db": {item.name: item.sqnr_db for item in layers if item.kind == "output"},
            "report": program.reports.get("mixed-formats", ""),
        }
        return row, rows


def bits_of(rows: Sequence[LayerRow]) -> float:
    """Return the bits for each weight of quantized layers, scales included."""
    return 8 * sum(row.bytes_after for row in rows) / sum(map(values, rows))


def values(row: LayerRow) -> int:
    return row.shape[0] * row.shape[1]


def wider(scheme: str, rows: Sequence[LayerRow], bits: float, seed: int) -> str:
    """Return the scheme with a rule for each of the layers, drawn at random, that get E2M3."""
    text, layers = str(Scheme.of(scheme)), list(rows)
    room = (bits - bits_of(rows)) * sum(map(values, rows))
    random.Random(seed).shuffle(layers)
    for row in layers:
        if 2 * values(row) <= room:
            room -= 2 * values(row)
            text += f"; {row.name}: w={row.weight.replace('f4E2M1FN', 'f6E2M3FN')}"
    return text


def table(report: Mapping[str, Any]) -> Table:
    result = Table(title=f"{report['model']} in {report['scheme']}: {report['protocol']}")
    names = list(report["fp32"])
    for name in ("budget", "choice", "bits", *names, "output dB"):
        result.add_column(name, justify="left" if name == "choice" else "right")
    result.add_row("", "fp32", "", *(f"{report['fp32'][name]:.5g}" for name in names), "")
    for row in report["rows"]:
        metrics = (f"{row['metrics'][name]:.5g}" for name in names)
        budget = "" if row["budget"] is None else f"{row['budget']:g}"
        noise = f"{next(iter(row['output_sqnr_db'].values())):.2f}"
        result.add_row(budget, row["choice"], f"{row['bits']:.3f}", *metrics, noise)
    return result


if __name__ == "__main__":
    main()
