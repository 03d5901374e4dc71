"""Damages an artifact in 19 ways, 1,000 times, and counts what becomes of it.

Every mutant has to be refused with an error of fpcompiler, or to give exactly the output of the
original; anything else is a failure and makes the script exit with 1.

    python examples/benchmarks/fuzz_artifacts.py                 # a small model that it builds
    python examples/benchmarks/fuzz_artifacts.py model.fpc       # an artifact of yours

The output is that of the first recorded call of the artifact.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # The mutations are part of the tests, which are not installed.

from fpcompiler.artifact import read, save  # noqa: E402
from fpcompiler.errors import FpcompilerError, RunError  # noqa: E402
from fpcompiler.runtime.executor import Executor  # noqa: E402
from tests.mutations import Tally, fuzz  # noqa: E402

RESULTS = ROOT / "examples" / "benchmarks" / "results" / "fuzz.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", nargs="?", help="an artifact with a recorded call")
    parser.add_argument("--count", type=int, default=1000, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--output", default=str(RESULTS), help="where the counts are written")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.artifact) if options.artifact else small_artifact(Path(folder))
        data = path.read_bytes()
        right = replay(path)
        start = time.perf_counter()
        tallies = fuzz(
            data, lambda mutant: equal(replay(mutant), right), Path(folder), options.count,
            options.seed,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    report = summary(tallies, len(data), seconds, options.seed)
    Path(options.output).write_text(json.dumps(report, indent=2) + "\n")
    for name, tally in tallies.items():
        print(f"{name:20} refused {tally.refused:5}  right {tally.right:5}")
    for tally in tallies.values():
        print(*tally.failures, sep="\n", end="\n" if tally.failures else "")
    print(report["total"])
    return 1 if report["total"]["failures"] else 0


def small_artifact(folder: Path) -> Path:
    """Write the artifact of a small hand-built model and return its path."""
    from tests.plans import Mlp, mlp_artifact, with_golden

    torch.manual_seed(0)
    path = folder / "original.fpc"
    save(path, with_golden(mlp_artifact(Mlp()), torch.randn(3, 64)))
    return path


def replay(path: Path) -> list[Tensor]:
    """Load an artifact and return the outputs of its first recorded call, run again."""
    artifact = read(path)
    if not artifact.golden:
        raise RunError(f"{path} has no recorded call, so there is no output to compare.")
    outputs = Executor(artifact.plan, artifact.tensors).run_leaves(artifact.golden[0].inputs)
    return [torch.as_tensor(output) for output in outputs]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Return whether two lists of tensors hold the same bits."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def summary(tallies: dict[str, Tally], size: int, seconds: float, seed: int) -> dict[str, Any]:
    """Return the counts as JSON values."""
    kinds = {
        name: {"refused": t.refused, "right": t.right, "failures": t.failures}
        for name, t in tallies.items()
    }
    return {
        "artifact_bytes": size,
        "seed": seed,
        "seconds": round(seconds, 2),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "total": {
            "mutants": sum(t.refused + t.right + len(t.failures) for t in tallies.values()),
            "refused": sum(t.refused for t in tallies.values()),
            "right": sum(t.right for t in tallies.values()),
            "failures": sum(len(t.failures) for t in tallies.values()),
        },
        "kinds": kinds,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FpcompilerError as error:
        sys.exit(f"error: {error}")
