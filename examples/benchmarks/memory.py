"""How much memory it takes to load and run a compiled SmolLM2, and what it imports.

    python examples/benchmarks/memory.py                                  # compiles the model first
    python examples/benchmarks/memory.py --artifact demo/smollm2-w4a6.fpc

Everything is measured in a new process of its own; this one imports no torch. The script prints the
numbers, writes ``results/memory.json``, and exits with 1 if the peak is not below the bytes of the
model's weights in fp32, or if a part of the compiler was imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "examples" / "benchmarks" / "results" / "memory.json"
TOKENS = 64
FORBIDDEN = (
    "torch_mlir", "transformers", "tokenizers", "gguf", "fpcompiler.ir", "fpcompiler.passes",
    "fpcompiler.codegen", "fpcompiler.capture", "fpcompiler.scheme",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--artifact", type=Path, help="SmolLM2, compiled; by default w4a6, anew")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the numbers")
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile:
        return compile_model(options.compile)
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or Path(folder) / "smollm2.fpc"
        if options.artifact is None:
            print("compiling SmolLM2 to w4a6 ...", file=sys.stderr)
            in_new_process("--compile", str(artifact))
        report = json.loads(in_new_process("--measure", str(artifact)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    print(f"written to {options.output}")
    good = report["peak_below_fp32_weights"] and not report["imported_of_the_compiler"]
    return 0 if good else 1


def in_new_process(*arguments: str) -> str:
    """Run this script with other arguments and return what it printed."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def compile_model(path: Path) -> int:
    """Compile SmolLM2 and save it."""
    import fpcompiler
    from examples.zoo import smollm2

    model = smollm2.load()
    fpcompiler.compile(model, "w4a6", example_inputs=smollm2.example_inputs()).save(path)
    return 0


def measure(artifact: Path) -> dict[str, Any]:
    """Load and run an artifact in this process; return the numbers as JSON values."""
    start = memory("after starting Python")
    import torch

    imported = memory("after import torch")
    of_torch = set(sys.modules)
    import fpcompiler

    began = time.perf_counter()
    model = fpcompiler.load(artifact)
    loaded = time.perf_counter()
    after_load = memory("after load")
    generator = torch.Generator().manual_seed(0)
    model(torch.randint(0, 49152, (1, TOKENS), generator=generator))
    ran = time.perf_counter()
    after_run = memory(f"after a run of {TOKENS} tokens")
    weights = fp32_bytes(model)
    return {
        "what": f"a new process loads SmolLM2-135M ({model.scheme}) and runs {TOKENS} tokens",
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        "artifact_bytes": artifact.stat().st_size,
        "fp32_weight_bytes": weights,
        "memory": [start, imported, after_load, after_run],
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_bytes": after_run["peak"],
        "peak_below_fp32_weights": after_run["peak"] < weights,
        "seconds": {"load": round(loaded - began, 3), "run": round(ran - loaded, 3)},
        "modules": len(sys.modules),
        "imported_of_the_compiler": [
            name for name in FORBIDDEN if name in sys.modules and name not in of_torch
        ],
    }


def memory(moment: str) -> dict[str, Any]:
    """Return the resident bytes now and at most so far, and how many of now are file pages.

    The peak is that of this program. ``ru_maxrss`` would not do: after fork and exec it starts with
    the peak of the parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    kinds = {"resident": "VmRSS", "peak": "VmHWM", "of_files": "RssFile"}
    bytes_of = {name: 1024 * int(values[key].split()[0]) for name, key in kinds.items()}
    return {"moment": moment, **bytes_of}


def fp32_bytes(model: Any) -> int:
    """Return the bytes of all weights in fp32, each tensor once (the embedding is the head too)."""
    rows = {row.name: row for row in model.plan().rows}
    assert rows["lm_head"].bytes_before == 0  # The plan counts a tied weight once, too.
    constants = model.artifact.plan.constants
    norms = [model.artifact.tensors[key] for key in {*constants.values()} if "norm" in key]
    return int(sum(r.bytes_before for r in rows.values()) + sum(4 * t.numel() for t in norms))


def machine() -> dict[str, Any]:
    """Return the device and the versions."""
    import os
    import platform

    import torch

    from examples.benchmarks.packing import device_name

    return {
        "device": str(device_name(torch.device("cpu"))),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def show(report: dict[str, Any]) -> None:
    """Print the numbers."""
    print(f"{'MB':34} {'resident':>9} {'of files':>9} {'peak':>9}")
    for row in report["memory"]:
        sizes = (f"{row[name] / 1e6:9.1f}" for name in ("resident", "of_files", "peak"))
        print(f"{row['moment']:34}", *sizes)
    print(f"{'the artifact':34} {report['artifact_bytes'] / 1e6:9.1f}")
    print(f"{'the weights in fp32':34} {report['fp32_weight_bytes'] / 1e6:9.1f}")
    ratio = report["peak_bytes"] / report["fp32_weight_bytes"]
    print(f"the peak, Python and torch included, is {ratio:.2f} of the weights in fp32")
    print(f"imported of the compiler: {', '.join(report['imported_of_the_compiler']) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
