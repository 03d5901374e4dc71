"""How long each pass takes, on a LLaMA of 24 layers with random weights and on SmolLM2.

    python examples/benchmarks/passes.py

The program is captured once and brought into MLIR again for each round; the median of the rounds
counts. The script prints a table for each model and writes ``results/passes.json``. It exits with 1
if the passes take 2 seconds or more together, ``quantize-weights`` (which packs the weights and
depends on their size) not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from examples.benchmarks.memory import machine
from fpcompiler import ir, passes
from fpcompiler.capture import CapturedProgram, capture
from fpcompiler.errors import DependencyError
from fpcompiler.passes.layers import name_layers
from fpcompiler.scheme import Scheme
from tests.models import Llama, token_ids

RESULTS = Path(__file__).parent / "results" / "passes.json"
LIMIT_SECONDS = 2.0
PACKING = "quantize-weights"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the numbers")
    options = parser.parse_args(arguments)
    scheme = str(Scheme.of(options.scheme))
    results = []
    for name, model, example in models():
        start = time.perf_counter()
        captured = capture(model, example, {})
        seconds = time.perf_counter() - start
        result = measure(captured, scheme, options.rounds)
        results.append({"model": name, "capture_seconds": round(seconds, 2), **result})
        show(results[-1])
    report = {
        "what": f"seconds of each pass and of the verifier after it, median of {options.rounds}",
        "scheme": scheme,
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        "limit_seconds": LIMIT_SECONDS,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.output}")
    slow = [r["model"] for r in results if r["seconds_without_packing"] >= LIMIT_SECONDS]
    if slow:
        print(f"too slow: {', '.join(slow)}")
    return 1 if slow else 0


def models() -> Iterator[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Yield models with an example call; SmolLM2 only if its package is installed."""
    torch.manual_seed(0)
    yield "LLaMA, 24 layers, random weights", Llama(layers=24).eval(), (token_ids(2, 12),)
    try:
        from examples.zoo import smollm2

        model, example = smollm2.load(), smollm2.example_inputs()
    except DependencyError as error:
        print(f"without SmolLM2: {error}", file=sys.stderr)
        return
    yield "SmolLM2-135M, 30 layers", model, example


def measure(captured: CapturedProgram, scheme: str, rounds: int) -> dict[str, Any]:
    """Run the default pipeline some times; return the medians."""
    pipeline = passes.default_pipeline(scheme)
    runs, imports, operations = [], [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        program = ir.import_program(captured.exported)
        name_layers(program)
        imports.append(time.perf_counter() - start)
        operations = sum(1 for _ in program.operations())
        runs.append(passes.run_pipeline(program, pipeline))
    rows = [row(same) for same in zip(*runs, strict=True)]
    total = sum(entry["seconds"] + entry["verify_seconds"] for entry in rows)
    packing = next(entry for entry in rows if entry["pass"] == PACKING)
    return {
        "operations": operations,
        "import_seconds": round(statistics.median(imports), 4),
        "seconds_without_packing": round(total - packing["seconds"], 4),
        "seconds": round(total, 4),
        "packed_gigabytes_per_second": round(
            1e-9 * packing["statistics"]["bytes before"] / packing["seconds"], 4
        ),
        "passes": rows,
    }


def row(same: Sequence[passes.PassResult]) -> dict[str, Any]:
    """Return the medians of the runs of one pass."""
    return {
        "pass": same[0].text.partition("{")[0],
        "seconds": round(statistics.median(result.seconds for result in same), 4),
        "verify_seconds": round(statistics.median(r.verify_seconds for r in same), 4),
        "slowest_seconds": round(max(result.seconds for result in same), 4),
        "statistics": dict(same[0].statistics),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table of one model."""
    print(f"{result['model']}: {result['operations']} operations")
    print(f"  {'captured in':22} {result['capture_seconds']:9.2f} s")
    print(f"  {'brought into MLIR in':22} {result['import_seconds']:9.2f} s")
    print(f"  {'pass':22} {'seconds':>9} {'verifier':>9} {'slowest':>9}")
    for entry in result["passes"]:
        times = (entry[key] for key in ("seconds", "verify_seconds", "slowest_seconds"))
        print(f"  {entry['pass']:22}", *(f"{value:9.4f}" for value in times))
    print(f"  {'all, verified':22} {result['seconds']:9.4f}")
    print(f"  {'without packing':22} {result['seconds_without_packing']:9.4f}")
    speed = result["packed_gigabytes_per_second"]
    print(f"  {'packing':22} {speed:9.2f} GB/s of fp32 weights")


if __name__ == "__main__":
    sys.exit(main())
