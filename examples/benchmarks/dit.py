"""What quantization does to the pictures that the trained DiT of examples/dit draws.

    python examples/benchmarks/dit.py compile
    python examples/benchmarks/dit.py evaluate --samples 2000 --device cuda --data FASHION_MNIST
    python examples/benchmarks/dit.py picture examples/dit/samples.png

``compile`` writes an artifact for each row, a scheme and a method, to ``--artifacts``. It learns
from calls that the sampler makes, as many for each of its timesteps, with other noise than what is
measured. ``evaluate`` needs no compiler, so that it can run where the GPU is: every row draws the
same classes from the same noise, and ``results/dit.json`` gets how far the pictures are from those
of the fp32 model, and what a classifier that was trained on real pictures says of them. A processor
draws a picture in about 0.1 s a step.

All schemes quantize the same layers, those that FP4DiT does: modulation, embeddings and the head
stay as they are. The integers have scales for 128 weights and for a token, as FP4DiT's formats do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.learned import Learning, PostponedError
from examples.benchmarks.packing import device_name
from examples.dit import fashion, weights
from examples.dit.classifier import Classifier, frechet_distance
from examples.dit.diffusion import Predict, sample, trajectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = "skip=role:modulation|role:embedding|role:head"
SCHEMES = {
    "int-w4a8": f"w=f4E1M2FN@block128:f32,a=f8E1M6FN@token:f32,{KEPT}",
    "int-w4a6": f"w=f4E1M2FN@block128:f32,a=f6E1M4FN@token:f32,{KEPT}",
    "fp4dit-w4a8": "fp4dit-w4a8",
    "fp4dit-w4a6": "fp4dit",
    "w4a6": f"w4a6,{KEPT}",
    "w4a4": f"w4a4,{KEPT}",
    "nvfp4": f"nvfp4,{KEPT}",
}
"""With one exponent bit all steps are equal: E1M2, E1M4 and E1M6 are INT4, INT6 and INT8."""
METHODS = ("rtn", "search", "adaround", "search-adaround")
ROWS = tuple(
    f"{scheme}:{method}"
    for scheme in SCHEMES
    for method in METHODS
    if not (scheme.startswith("int") and "search" in method)  # It would leave the integers.
)
GUIDANCE = 2.0
NONE = len(fashion.CLASSES)
"""The label that stands for no class."""
SEED = 1000
"""Of the noise of the evaluation; calibration takes seeds from 0."""
SIDE = 28
FEATURES = 128
METRICS = {
    "psnr_db": ".2f",
    "frechet_to_fp32": ".2f",
    "frechet_to_real": ".2f",
    "class_accuracy": ".3f",
}
"""For each metric, how it is written."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.work(options, Console(width=None if sys.stdout.isatty() else 130))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rows", nargs="+", metavar="SCHEME:METHOD", help="by default all")
    shared.add_argument("--artifacts", type=Path, default=ROOT / "build" / "dit", help="folder")
    shared.add_argument("--steps", type=int, default=20, help="of the sampler")
    shared.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("compile", parents=[shared])
    build.add_argument("--pictures", type=int, default=8, help="in a call, twice: without class")
    build.add_argument("--calls", type=int, default=20, help="to learn from")
    build.add_argument("--round-budget", help="for learning roundings, such as 5min")
    build.add_argument("--jobs", type=Path, help="learn roundings elsewhere: see learned.py")
    build.set_defaults(work=compile_rows)
    judge = commands.add_parser("evaluate", parents=[shared])
    judge.add_argument("--samples", type=int, default=40, help="Frechet distances need 512")
    judge.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    judge.add_argument("--add", action="store_true", help="keep the rows that are recorded")
    judge.add_argument("--out", type=Path, default=HERE / "results" / "dit.json")
    judge.set_defaults(work=evaluate)
    show = commands.add_parser("picture", parents=[shared])
    show.add_argument("path", type=Path, help="a PNG")
    show.set_defaults(work=picture, samples=len(fashion.CLASSES))
    for command in (judge, show):
        command.add_argument("--batch", type=int, default=50, help="pictures at a time")
        command.add_argument("--device", default="cpu")
    return parser.parse_args()


def compile_rows(options: argparse.Namespace, console: Console) -> None:
    """Write an artifact, and beside it what it took to make it, for each row."""
    options.artifacts.mkdir(parents=True, exist_ok=True)
    calls = calibration(options)
    for text in options.rows or ROWS:
        try:
            row = compile_row(text, calls, options)
        except PostponedError as job:
            console.print(f"{text}: to be learned: {job}")
            continue
        file_of(text, options).with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")
        console.print(f"{text}: compiled in {row['compile']['seconds']:.0f} s")


def calibration(options: argparse.Namespace) -> list[Any]:
    """Return calls of the sampler, balanced over its timesteps; each with and without a class."""
    model = weights.dit()
    labels = torch.arange(options.pictures) % NONE
    with fpcompiler.record(model, limit=options.calls, balance="t") as calls:
        for seed in range(math.ceil(options.calls / options.steps)):
            sample(model, labels, steps=options.steps, guidance=GUIDANCE, none=NONE, seed=seed)
    return calls


def compile_row(text: str, calls: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    scheme, method = text.rpartition(":")[::2]
    start = time.perf_counter()
    learning: dict[str, Any] = {}
    compiled = fpcompiler.compile(
        weights.dit(),
        SCHEMES.get(scheme, scheme),
        calibration=calls,
        pipeline=pipeline(text, options, learning),
    )
    seconds = time.perf_counter() - start
    path = file_of(text, options)
    compiled.save(path)
    rows = [row for row in compiled.plan().rows if row.quantized]
    return {
        "scheme": scheme,
        "method": method,
        "exact": compiled.scheme,
        "quantized_layers": len(rows),
        "quantized_bytes_ratio_to_bf16": sum(row.bytes_after for row in rows)
        / sum(2 * row.shape[0] * row.shape[1] for row in rows),
        "artifact_bytes": path.stat().st_size,
        "calibration": f"{len(calls)} of the calls of {options.steps} steps, "
        f"{options.pictures} pictures each with and without class",
        "compile": {
            "seconds": seconds,
            **environment(torch.device("cpu"), options),
        },
        **({"learning": learning} if learning else {}),
    }


def pipeline(text: str, options: argparse.Namespace, learning: dict[str, Any]) -> Any:
    """Return the passes of a row; what is learned is noted."""
    from fpcompiler.passes import default_pipeline
    from fpcompiler.passes.round_weights import RoundWeights
    from fpcompiler.scheme import Scheme

    scheme, method = text.rpartition(":")[::2]
    learner = Learning(file_of(text, options).stem, options.jobs)

    class Noted(RoundWeights):
        def learn(self, walk: Any, context: Any) -> Any:
            found, noted = learner(walk, lambda: super(Noted, self).learn(walk, context))
            learning.update(noted)
            return found

    budget = options.round_budget if "adaround" in method else None
    exact = str(Scheme.of(SCHEMES.get(scheme, scheme)))
    passes = default_pipeline(exact, method=method, round_budget=budget or "")
    return tuple(Noted(**vars(item)) if isinstance(item, RoundWeights) else item for item in passes)


def file_of(text: str, options: argparse.Namespace) -> Path:
    """Return where the artifact of a row is."""
    name = re.sub(r"[^\w.-]+", "_", "-".join(text.rpartition(":")[::2]))
    path: Path = options.artifacts / f"{name}.fpc"
    return path


def environment(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "threads": options.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fpcompiler": fpcompiler.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Measure every row; the file is written after each, so that nothing is lost."""
    protocol = {name: getattr(options, name) for name in ("samples", "steps", "batch")}
    protocol |= {"guidance": GUIDANCE, "seed": SEED, "real": options.data is not None}
    device = torch.device(options.device)
    judge = Judge(options, device)
    report = {
        "model": "examples/dit",
        "protocol": protocol,
        **environment(device, options),
        "fp32": {"metrics": judge.metrics(judge.reference)},
        "rows": recorded(options.out, protocol) if options.add else [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for text, row in artifacts(options):
        start = time.perf_counter()
        pictures = drawn(fpcompiler.load(file_of(text, options), device), options)
        row |= {"metrics": judge.metrics(pictures), "seconds": time.perf_counter() - start}
        row |= {"evaluated_on": report["device"]}
        others = [r for r in report["rows"] if f"{r['scheme']}:{r['method']}" != text]
        report["rows"] = sorted([*others, row], key=place)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"{text}: {row['metrics']} in {row['seconds']:.0f} s")
    console.print(table(report))
    console.print(f"written to {options.out}")


def recorded(path: Path, protocol: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows on record, which must have been measured in the same way."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    if report["protocol"] != protocol:
        sys.exit(f"{path} was measured with {report['protocol']}; --add needs the same options.")
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def artifacts(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows whose artifacts are there, and what is known of them."""
    if not options.rows:
        found = [json.loads(path.read_text()) for path in options.artifacts.glob("*.json")]
        yield from ((f"{row['scheme']}:{row['method']}", row) for row in sorted(found, key=place))
        return
    for text in options.rows:
        path = file_of(text, options).with_suffix(".json")
        if not path.exists():
            sys.exit(f"there is no {path}; run: dit.py compile --rows {text}")
        yield text, json.loads(path.read_text())


def place(row: Mapping[str, Any]) -> tuple[int, str]:
    """Return where a row stands in tables."""
    text = f"{row['scheme']}:{row['method']}"
    return (ROWS.index(text) if text in ROWS else len(ROWS)), text


@torch.no_grad()
def drawn(predict: Predict, options: argparse.Namespace) -> Tensor:
    """Return pictures ``[samples, 1, 28, 28]`` of the classes in turn, always from one noise."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(options.samples, 1, SIDE, SIDE, generator=generator)
    found = []
    for numbers in torch.arange(options.samples).split(options.batch):
        start, labels = (x.to(options.device) for x in (noise[numbers], numbers % NONE))
        path = trajectory(predict, start, labels, steps=options.steps, guidance=GUIDANCE, none=NONE)
        *_, (_, pictures) = path
        found.append(pictures)
    return torch.cat(found)


class Judge:
    """Compares pictures with those of the fp32 model, and with real ones if there are any."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.classifier: Classifier = weights.classifier().to(device)
        self.labels = torch.arange(options.samples, device=device) % NONE
        self.reference = drawn(weights.dit().to(device), options)
        self.features = {}
        if options.samples >= 4 * FEATURES:  # Covariances of fewer are far off.
            self.features["frechet_to_fp32"] = self._features(self.reference)
            if options.data is not None:
                images, _ = fashion.pictures("t10k", options.data)
                self.features["frechet_to_real"] = self._features(fashion.scaled(images))

    @torch.no_grad()
    def metrics(self, pictures: Tensor) -> dict[str, float]:
        """Return what is measured; PSNR over all pixels, of which the peak is 2."""
        error = float((pictures.double() - self.reference.double()).square().mean())
        right = (self.classifier(pictures).argmax(1) == self.labels).double().mean()
        found = {"psnr_db": 10 * math.log10(4 / error)} if error else {}
        for name, features in self.features.items():
            if pictures is not self.reference or name != "frechet_to_fp32":
                found[name] = frechet_distance(self._features(pictures), features)
        return {**found, "class_accuracy": float(right)}

    def _features(self, pictures: Tensor) -> Tensor:
        device = self.labels.device
        parts = [self.classifier.features(part.to(device)) for part in pictures.split(1000)]
        return torch.cat(parts)


def table(report: Mapping[str, Any]) -> Table:
    result = Table(title=f"{report['model']}: {report['protocol']}")
    for name in ("scheme", "method", *METRICS, "of bf16", "compile s"):
        result.add_column(name, justify="left" if name in ("scheme", "method") else "right")
    result.add_row("fp32", "", *cells(report["fp32"]["metrics"]), "", "")
    for row in report["rows"]:
        size = f"{row['quantized_bytes_ratio_to_bf16']:.3f}"
        seconds = f"{row['compile']['seconds']:.0f}"
        result.add_row(row["scheme"], row["method"], *cells(row["metrics"]), size, seconds)
    return result


def cells(metrics: Mapping[str, float]) -> list[str]:
    return [f"{metrics[name]:{form}}" if name in metrics else "" for name, form in METRICS.items()]


def picture(options: argparse.Namespace, console: Console) -> None:
    """Draw one picture of each class by the fp32 model and by every row, from the same noise."""
    from examples.dit.pictures import draw

    rows = {"fp32": drawn(weights.dit().to(options.device), options)}
    for text, row in artifacts(options):
        compiled = fpcompiler.load(file_of(text, options), options.device)
        rows[f"{row['scheme']} {row['method']}"] = drawn(compiled, options)
    draw(options.path, rows, fashion.CLASSES)
    console.print(f"written to {options.path}")


if __name__ == "__main__":
    main()
