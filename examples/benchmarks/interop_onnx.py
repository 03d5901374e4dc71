"""ONNX files of the models of the zoo, against the artifacts that they were made from.

    python examples/benchmarks/interop_onnx.py --models minilm dinov2
    python examples/benchmarks/interop_onnx.py --models smollm2 --weight-only

For each model the artifact is exported in both styles. What is recorded:

* the metric of the model, from the artifact on the reference backend, from the artifact on the
  native one, and from ``onnx-portable`` on onnxruntime;
* the recorded call of the artifact on onnxruntime and, in the standard style, on the evaluator of
  onnx: the SQNR to the reference, and the one that changes of last bits alone lead to;
* every quantization and every product of that call one by one, on the tensors of the very run: the
  quantized values must be those of ``fpcompiler.numerics`` bit for bit, and a product may differ
  from that in fp64 by what rounding K products to fp32 explains, ``K * 2**-24 * sum|ab|``;
* the weights as onnx's own reader decodes them, which must be those of the artifact bit for bit;
* whether netron's parser opens the files (with ``node`` and the package ``netron``).

The whole output cannot be compared by a bound: one code that rounds the other way after another
order of additions goes through all layers behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.accuracy import MODELS, RESULTS, processor, task
from examples.benchmarks.onnx_steps import check_steps, evaluate
from examples.zoo import corpora
from examples.zoo.metrics import mean_cosine
from examples.zoo.runs import RUNS
from examples.zoo.tasks import Part, Task
from fpcompiler.artifact import Artifact
from fpcompiler.interop.onnx.read import read_weights
from fpcompiler.numerics import dequantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.verify import measure_noise, ratios

STYLES = ("portable", "standard")
WEIGHT_ONLY = "w4a16"
"""Without rounded activations the last bits of a run stay last bits."""
ENCODER_PROTOCOL = "5 LibriVox clips: mean cosine of the encoder's states with those in fp32"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "ml_dtypes", "netron", "transformers")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    file = options.out / "interop_onnx.json"
    report: dict[str, Any] = {
        "device": processor(),
        "threads": options.threads,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "scheme": options.scheme,
        "models": {},
        "weight_only": {},
    }
    if file.is_file():
        before = json.loads(file.read_text())
        report |= {key: before.get(key, {}) for key in ("models", "weight_only")}
    for name in options.models:
        section, measure = (
            ("weight_only", weight_only) if options.weight_only else ("models", measured)
        )
        report[section][name] = measure(task(name, options), options)
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report[section][name], indent=1))
    print(f"written to {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument(
        "--weight-only", action="store_true", help=f"the metrics with {WEIGHT_ONLY}, nothing else"
    )
    parser.add_argument("--tokens", type=int, default=1536, help="of the text for perplexity")
    parser.add_argument("--clips", type=Path, default=corpora.LIBRIVOX, help="folder of speech")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args()


def measured(model: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return all that is recorded of a model."""
    with tempfile.TemporaryDirectory() as folder:
        programs, parts = {}, {}
        for name, part in parts_of(model).items():
            programs[name] = fpcompiler.compile(
                part.module, options.scheme, example_inputs=part.example
            )
            parts[name] = dict(exports(programs[name], Path(folder) / name))
        files = {name: Path(folder) / f"{name}-portable.onnx" for name in programs}
        return {"parts": parts, "metrics": metrics(model, programs, files)}


def weight_only(model: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return the metrics with weights alone quantized."""
    programs, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts_of(model).items():
            compiled = fpcompiler.compile(part.module, WEIGHT_ONLY, example_inputs=part.example)
            programs[name], files[name] = compiled, Path(folder) / f"{name}.onnx"
            compiled.export(files[name], "onnx-portable")
        return metrics(model, programs, files)


def parts_of(model: Task) -> dict[str, Part]:
    """Return what is exported of a model: all of it, but of Whisper the encoder."""
    parts = model.parts()
    return {"encoder": parts["encoder"]} if model.name == "whisper" else dict(parts)


def run(model: Task, parts: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the metric of a model is computed from."""
    if model.name != "whisper":
        return RUNS[model.name](parts, inputs)
    with torch.no_grad():
        states = [parts["encoder"](features) for features in inputs["features"].split(1)]
    return {"states": torch.cat(states)}


def score(
    model: Task, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the metric: that of the model, and for an encoder the cosine with that in fp32."""
    if model.name != "whisper":
        return model.score(found, expected)
    return {"state_cosine": mean_cosine(expected["states"], found["states"])}


def metrics(
    model: Task, programs: Mapping[str, CompiledModel], files: Mapping[str, Path]
) -> dict[str, Any]:
    """Return the metric of the model from each way to run it."""
    runs = {
        "reference": {n: CompiledModel(on_reference(p.artifact)) for n, p in programs.items()},
        "native": programs,
        "onnxruntime": {n: fpcompiler.load(f, backend="onnxruntime") for n, f in files.items()},
    }
    inputs, found, seconds = model.inputs(), {}, {}
    fp32 = {name: part.module for name, part in parts_of(model).items()}
    expected = run(model, fp32, inputs)
    for name, parts in runs.items():
        start = time.perf_counter()
        found[name] = score(model, run(model, parts, inputs), expected)
        seconds[name] = time.perf_counter() - start
    protocol = ENCODER_PROTOCOL if model.name == "whisper" else model.protocol
    return {"protocol": protocol, "seconds": seconds, **found}


def on_reference(artifact: Artifact) -> Artifact:
    """Return the artifact for the reference backend."""
    steps = tuple(dataclasses.replace(step, kernel="") for step in artifact.plan.steps)
    return dataclasses.replace(artifact, plan=dataclasses.replace(artifact.plan, steps=steps))


def exports(program: CompiledModel, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what each style of file is and gives."""
    artifact = program.artifact
    noise = measure_noise(on_reference(artifact))[0]
    yield "noise_db", noise if np.isfinite(noise) else None
    inputs = artifact.golden[0].inputs
    expected = CompiledModel(on_reference(artifact))._ready().run_leaves(inputs)
    for style in STYLES:
        file = path.with_name(f"{path.name}-{style}.onnx")
        start = time.perf_counter()
        written = program.export(file, f"onnx-{style}")
        row: dict[str, Any] = {
            "export_seconds": time.perf_counter() - start,
            "bytes": sum(f.stat().st_size for f in written.files if "golden" not in f.name),
            **written.facts,
        }
        start = time.perf_counter()
        outputs, tensors = evaluate(file, style, inputs)
        row["run_seconds"] = time.perf_counter() - start
        row["sqnr_db"] = [r if np.isfinite(r) else None for r in ratios(expected, outputs)]
        row["bit_equal"] = all(map(torch.equal, expected, outputs))
        row["steps"] = check_steps(artifact, file, tensors)
        row["weights"] = check_weights(artifact, file)
        row["netron"] = netron(file)
        yield style, row


def check_weights(artifact: Artifact, file: Path) -> dict[str, int]:
    """Return how many weights of a file are those of the artifact, bit for bit."""
    weights, equal = read_weights(file), 0
    for layer, expected in stored_weights(artifact).items():
        equal += np.array_equal(weights[layer].values, expected.numpy())
    return {"weights": len(weights), "bit_equal": equal}


def stored_weights(artifact: Artifact) -> dict[str, Tensor]:
    """Return the dequantized weights of an artifact by layer."""
    plan, found = artifact.plan, {}
    for step in plan.steps:
        if step.op == "fpc.linear":
            packed, *scales = (artifact.tensors[plan.constants[a["v"]]] for a in step.args[1])
            operand = Operand.parse(step.args[4])
            found[step.args[7]] = dequantize_packed(packed, tuple(scales), operand, step.args[5])
    return found


def netron(file: Path) -> dict[str, Any] | None:
    """Return what netron's parser finds in a file; None where node or netron is missing."""
    found = importlib.util.find_spec("netron")
    if found is None or found.origin is None or shutil.which("node") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        # Beside a file that says so, node takes netron's sources for modules.
        copied = shutil.copytree(Path(found.origin).parent, Path(folder) / "netron")
        (copied / "package.json").write_text('{"type": "module"}')
        script = Path(__file__).with_name("netron_open.mjs")
        command = ["node", str(script), str(copied), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip()[-500:]}
    (opened,) = json.loads(done.stdout).values()
    return {name: opened[name] for name in ("format", "nodes", "inputs", "outputs", "errors")}


if __name__ == "__main__":
    main()
