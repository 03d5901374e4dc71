"""How fast a compiled language model reads and generates on this processor, and its memory.

    python examples/benchmarks/llm.py             # everything, about ten minutes
    python examples/benchmarks/llm.py --quick     # whether everything works
    python examples/benchmarks/llm.py --runtimes fpcompiler llama.cpp-q4_0 --rounds 9

SmolLM2-135M reads a prompt of 512 tokens of an article and generates 128, one after the other, the
most likely ones. Each runtime is a process of its own, loaded once; they take turns, round after
round, and what is reported of two is the median of their ratios in the same round. llama.cpp runs
the weights as Q4_0 with a head of 8 bits; ours are w4a6 with a head of 8 bits too (``--scheme``).

Memory is the peak of the resident memory of a process, and how much that is above what it was when
its libraries were loaded and the model was not. The machine should do nothing else meanwhile.

Runtimes that are not installed are left out, and the table says so. To have them all, in a virtual
environment of their own (llama-cpp-python is compiled, about ten minutes)::

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 && peers/bin/pip install . transformers gguf
    peers/bin/pip install --no-deps -r examples/requirements.txt
    CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    peers/bin/python examples/benchmarks/llm.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.language_model import worker
from examples.benchmarks.language_model.problem import Problem
from examples.benchmarks.language_model.runtimes import RUNTIMES, Runtime
from examples.benchmarks.language_model.summary import grown, ratio
from examples.benchmarks.packing import device_name
from examples.zoo import smollm2

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(__file__).parent / "results" / "llm.json"
SCHEME = "w4a6; lm_head: w=f8E1M6FN@row:f32"
OURS = "fpcompiler"

BARS = (
    ("llama.cpp-q4_0", "token_seconds", 1.0, "tokens generated, against llama.cpp Q4_0"),
    ("hf-eager-bf16", "token_seconds", 3.0, "tokens generated, against transformers in bf16"),
)
"""What is compared, how, and how many times faster it should be."""
MEMORY_BAR = 0.45
"""Of the memory that the model in bf16 takes."""


class Process:
    """A worker, and the line to it."""

    def __init__(self, runtime: Runtime, problem: Problem, file: Path) -> None:
        command = worker.command(runtime.name, problem, file)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def ask(self, word: str) -> dict[str, Any]:
        """Return what the worker answers to a word."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self._process.args} stopped")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show and write."""
    options = parse(arguments)
    problem = Problem(options.prompt, options.tokens, options.threads, options.scheme)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(options.folder or temporary)
        files = {name: folder / f"{name}-{problem.positions}" for name in options.runtimes}
        missing = {name: RUNTIMES[name].missing(file) for name, file in files.items()}
        left_out = {
            name: f"{module} is not installed" for name, module in missing.items() if module
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / worker.PROMPT).write_text(json.dumps(smollm2.tokens(problem.prompt).tolist()))
        processes = {}
        for name, file in files.items():
            if name in left_out:
                continue
            runtime = RUNTIMES[name]
            prepare(runtime, problem, file, console)
            process = Process(runtime, problem, file)
            stack.callback(process.close)
            processes[runtime.name] = process
        rounds = measure(processes, options.rounds, console)
        memory = {name: process.ask("memory") for name, process in processes.items()}
    report = {
        "what": "SmolLM2-135M: seconds of a prompt and of a generated token, resident bytes",
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "versions": versions(),
        "problem": {**vars(problem)},
        "left_out": left_out,
        "rounds": rounds,
        "memory": memory,
    }
    show(report, console)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {options.out}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scheme", default=SCHEME, help="what the model is compiled to")
    parser.add_argument("--folder", type=Path, help="keeps the files of the models")
    parser.add_argument("--quick", action="store_true", help="short texts, one round, no record")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.name} in results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompt, options.tokens, options.rounds = 16, 8, 1
    elif options.out is None:
        options.out = OUT
    return options


def environment() -> dict[str, str]:
    """Return the environment of a worker: it finds the project, and prints nothing else."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "FPC_PROGRESS": "0"}


def prepare(runtime: Runtime, problem: Problem, file: Path, console: Console) -> None:
    """Write the file of a runtime, unless it is there or none is needed."""
    if runtime.prepare is None or file.exists():
        return
    console.print(f"preparing {runtime.name} ...")
    subprocess.run(
        worker.command(runtime.name, problem, file),
        env=environment(), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def measure(
    processes: Mapping[str, Process], rounds: int, console: Console
) -> list[dict[str, dict[str, float]]]:
    """Let everyone take its turn, in an order that moves on from round to round."""
    found = []
    names = list(processes)
    for number in range(rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        found.append({name: processes[name].ask("go") for name in order})
        times = (f"{name} {1 / found[-1][name]['token_seconds']:.0f}/s" for name in names)
        console.print(f"round {number + 1} of {rounds}: {', '.join(times)}")
    return found


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the table and what became of the bars."""
    problem = report["problem"]
    table = Table(title=f"SmolLM2-135M, {problem['threads']} threads, {report['device']}")
    table.add_column("runtime")
    for column in ("prompt, tokens/s", "generated, tokens/s", "peak MB", "of the model, MB"):
        table.add_column(column, justify="right")
    for name, memory in report["memory"].items():
        times = [r[name] for r in report["rounds"]]
        reading = statistics.median(problem["prompt"] / t["prompt_seconds"] for t in times)
        writing = statistics.median(1 / t["token_seconds"] for t in times)
        peak, own = memory["after"]["peak"] / 1e6, grown(report, name) / 1e6
        table.add_row(name, f"{reading:.0f}", f"{writing:.1f}", f"{peak:.0f}", f"{own:.0f}")
    for name, reason in report["left_out"].items():
        table.add_row(name, reason)
    console.print(table)
    for other, key, bar, text in BARS:
        found = ratio(report, other, OURS, key)
        if found is not None:
            console.print(f"{text}: {found:.2f}x ({'reached' if found >= bar else 'below'} {bar}x)")
    if {OURS, "hf-eager-bf16"} <= set(report["memory"]):
        share = grown(report, OURS) / grown(report, "hf-eager-bf16")
        word = "reached" if share <= MEMORY_BAR else "above"
        console.print(f"memory of the model, against bf16: {share:.2f} ({word} {MEMORY_BAR})")


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"python": sys.version.split()[0]}
    for package in ("fpcompiler", "torch", "transformers", "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
