"""Learning roundings in benchmarks: here, or on a machine that has a GPU and no compiler.

python examples/benchmarks/dit.py compile --jobs JOBS      # writes what is to be learned
python examples/benchmarks/learned.py JOBS --device cuda   # there
python examples/benchmarks/dit.py compile --jobs JOBS      # goes on with the results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.packing import device_name
from fpcompiler.numerics.adaround import Ended
from fpcompiler.reconstruction import Walk, load_walk, save_walk
from fpcompiler.streams import Result, Results


class PostponedError(Exception):
    """The roundings are to be learned elsewhere."""


@dataclass(frozen=True)
class Learning:
    """Learns the roundings of a row, or takes what was learned elsewhere.

    Attributes:
        name: Of the row.
        jobs: Folder for what is learned elsewhere; None: here.
    """

    name: str
    jobs: Path | None

    def __call__(self, walk: Walk, otherwise: Any) -> tuple[Mapping[str, Result], dict[str, Any]]:
        """Return the results, and what is recorded of them.

        Raises:
            PostponedError: If a job was written.
        """
        if self.jobs is None:
            start = time.perf_counter()
            found = otherwise()
            seconds = time.perf_counter() - start
            return found, recorded(
                found, {"device": device_name(walk.settings.device), "seconds": seconds}
            )
        job = self.jobs / f"{self.name}.pt"
        done = job.with_suffix(".json")
        if not done.exists():
            self.jobs.mkdir(parents=True, exist_ok=True)
            save_walk(walk, job)
            raise PostponedError(job)
        there = load_walk(job, job.with_suffix(""), "cpu")
        if not same(walk, there):
            sys.exit(f"{job} was written for other data or options; delete it and its results.")
        learned = Results(job.with_suffix("") / "results")
        if not all(learned.has(unit.name) for unit in there.units):
            sys.exit(f"{job.with_suffix('')} lacks results, though {done} says that it is done.")
        found = there.run(lambda items, total, label: items, self.name)
        return found, recorded(found, json.loads(done.read_text()))


def same(one: Walk, other: Walk) -> bool:
    """Return whether two walks learn the same roundings from the same data."""
    tensors = [
        [*(s for name in sorted(w.rounding) for s in w.rounding[name].scales)]
        + [t for batch in w.batches for t in batch]
        for w in (one, other)
    ]
    return (
        [(u.name, u.weights) for u in one.units] == [(u.name, u.weights) for u in other.units]
        and one.settings.options == other.settings.options
        and len(tensors[0]) == len(tensors[1])
        and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*tensors, strict=True))
    )


def recorded(found: Mapping[str, Result], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was learned in words and numbers."""
    units = {}
    for name, result in found.items():
        nearest, error = result["errors"].tolist()
        units[name] = {
            "error_of_rtn": error / nearest if nearest else 1.0,
            "kept": bool(result["kept"]),
            "iterations": int(result["iterations"]),
            "ended": list(Ended)[int(result["ended"])].value,
        }
    return {**where, "units": units}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", type=Path, help="a folder of jobs, or one of them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--at-once", type=int, default=12, help="jobs on the device; 1 to time them"
    )
    options = parser.parse_args()
    if options.jobs.is_file():
        learn(options.jobs, options.device, options.at_once)
        return
    waiting = [
        job for job in sorted(options.jobs.glob("*.pt")) if not job.with_suffix(".json").exists()
    ]
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while waiting or running:
        while waiting and len(running) < options.at_once:
            shared = ["--device", options.device, "--at-once", str(options.at_once)]
            running.append(subprocess.Popen([sys.executable, __file__, waiting.pop(0), *shared]))
        time.sleep(1)
        failed += sum(bool(process.poll()) for process in running)
        running = [process for process in running if process.poll() is None]
    if failed:
        sys.exit(f"{failed} jobs failed; what they printed is above.")


def learn(job: Path, device: str, at_once: int) -> None:
    """Learn one job, beside others; results lie in a folder of its name, a killed run goes on."""
    start = time.perf_counter()
    walk = load_walk(job, job.with_suffix(""), device)
    found = walk.run(lambda items, total, label: items, job.stem, print)
    where = {
        "device": device_name(torch.device(device)),
        "jobs_at_once": at_once,
        "seconds": time.perf_counter() - start,
    }
    job.with_suffix(".json").write_text(json.dumps(where) + "\n")
    for name, unit in recorded(found, where)["units"].items():
        print(job.stem, name, round(unit["error_of_rtn"], 3), unit["iterations"], flush=True)


if __name__ == "__main__":
    main()
