"""Packages of AOTInductor of the models of the zoo, against the artifacts they were made from.

    python examples/benchmarks/interop_aoti.py --models minilm dinov2

What is recorded of each model:

* sizes and the time of the export;
* what a process without fpcompiler gets from the package for the example call, against the native
  backend: equal bits or the SQNR, and the SQNR that changes of last bits alone lead to;
* the metric of the model from the native backend and from the package;
* the time of a call with the package and with torch.compile in bf16, against the native backend.
  Candidates take turns in short slots, in an order that changes from round to round, and what is
  reported is the median of the ratios in the same round. With one thread the time of the processor
  counts, so that others who use it do not; with more the time of the clock.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.accuracy import RESULTS, processor, task
from examples.zoo.runs import RUNS
from examples.zoo.tasks import Part, Task
from fpcompiler.artifact import Golden
from fpcompiler.native import INSTRUCTION_SETS, library
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.verify import measure_noise, ratios

MODELS = ("minilm", "dinov2")
ROUNDS = 15
SLOT = 0.3
"""Seconds for which a candidate is called before it is another one's turn."""

FRESH = """
import sys
sys.modules["fpcompiler"] = None
import torch
torch.set_num_threads(int(sys.argv[3]))
model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(model(*torch.load(sys.argv[2])), sys.argv[2])
"""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    file = options.out / "interop_aoti.json"
    native = library()
    assert native is not None, "there is no native library"
    report: dict[str, Any] = {
        "device": processor(),
        "instructions": INSTRUCTION_SETS[native.instructions],
        "threads": options.threads,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "scheme": options.scheme,
        "models": {},
    }
    for name in options.models:
        report["models"][name] = measured(task(name, options), options)
        print(json.dumps(report["models"][name], indent=1))
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args()


def measured(model: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return all that is recorded of a model."""
    (part,) = model.parts().values()
    compiled = fpcompiler.compile(part.module, options.scheme, example_inputs=part.example)
    with tempfile.TemporaryDirectory() as folder:
        file, artifact = Path(folder) / "model.pt2", Path(folder) / "model.fpc"
        compiled.save(artifact)
        start = time.perf_counter()
        facts = compiled.export(file, "aoti").facts
        seconds = time.perf_counter() - start
        package = torch._inductor.aoti_load_package(str(file))
        return {
            "export_seconds": seconds,
            "check": facts["check"],
            "bytes": {"package": file.stat().st_size, "artifact": artifact.stat().st_size},
            "fresh_process": equality(compiled, part, file, options.threads),
            "metrics": metrics(model, part, compiled, package),
            "time_to_native": times(part, compiled, package, options),
        }


def equality(compiled: CompiledModel, part: Part, file: Path, threads: int) -> dict[str, Any]:
    """Return how a process without fpcompiler runs the example call."""
    call = file.with_name("call.pt")
    torch.save(part.example, call)
    command = [sys.executable, "-I", "-c", FRESH, str(file), str(call), str(threads)]
    subprocess.run(command, check=True)
    found = pytree.tree_leaves(torch.load(call))
    expected = tensors(compiled(*part.example))
    golden = (Golden(tuple(part.example), tuple(expected)),)
    noise = measure_noise(dataclasses.replace(compiled.artifact, golden=golden))[0]
    return {
        "bit_equal": all(map(torch.equal, expected, found)),
        "sqnr_db": [r if math.isfinite(r) else None for r in ratios(expected, found)],
        "noise_db": noise if math.isfinite(noise) else None,
    }


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result, in order."""
    return (
        list(result.values()) if isinstance(result, Mapping) else list(pytree.tree_leaves(result))
    )


def metrics(
    model: Task, part: Part, compiled: CompiledModel, package: Callable[..., Any]
) -> dict[str, Any]:
    """Return the metrics of the model from each way to run it."""

    def named(*args: Tensor) -> Any:
        result = package(*args)
        return SimpleNamespace(**result) if isinstance(result, dict) else result

    inputs, run = model.inputs(), RUNS[model.name]
    expected = run({"model": part.module}, inputs)
    ways: dict[str, Callable[..., Any]] = {"native": compiled, "package": named}
    scores = {n: model.score(run({"model": way}, inputs), expected) for n, way in ways.items()}
    return {"protocol": model.protocol, **scores}


def times(
    part: Part, compiled: CompiledModel, package: Callable[..., Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the times of calls relative to the native backend, and its own in seconds."""
    low: nn.Module = torch.compile(copy.deepcopy(part.module).to(torch.bfloat16))
    cast = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in part.example]
    calls: dict[str, Callable[[], Any]] = {
        "native": lambda: compiled(*part.example),
        "aoti": lambda: package(*part.example),
        "torch_compile_bf16": lambda: low(*cast),
    }
    with torch.no_grad():
        for call in calls.values():
            for _ in range(3):
                call()
        rounds = [turn(calls, index, options.threads) for index in range(options.rounds)]
    relative = {
        name: statistics.median(row[name] / row["native"] for row in rounds)
        for name in calls
        if name != "native"
    }
    own = statistics.median(row["native"] for row in rounds)
    return {"input": shapes(part.example), "native_seconds": own, **relative, "rounds": rounds}


def shapes(example: Sequence[Tensor]) -> list[list[int]]:
    return [list(x.shape) for x in example]


def turn(calls: Mapping[str, Callable[[], Any]], index: int, threads: int) -> dict[str, float]:
    """Return the median time of a call of each candidate; the first one is another each time."""
    names = list(calls)
    order = names[index % len(names) :] + names[: index % len(names)]
    clock = time.process_time if threads == 1 else time.perf_counter
    found = {}
    for name in order:
        taken, end = [], time.perf_counter() + SLOT
        while len(taken) < 3 or time.perf_counter() < end:
            start = clock()
            calls[name]()
            taken.append(clock() - start)
        found[name] = statistics.median(taken)
    return {name: found[name] for name in names}


if __name__ == "__main__":
    main()
