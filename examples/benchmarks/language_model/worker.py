"""A runtime in a process of its own: it waits for a word, works, and answers with a line of JSON.

    python -m examples.benchmarks.language_model.worker NAME PROBLEM FILE

While it waits it does nothing, so that several of them can take turns.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from examples.benchmarks.language_model.problem import Problem
from examples.benchmarks.language_model.runtimes import RUNTIMES, Session

WARM_TOKENS = 4
"""Tokens after the prompt before anything is measured; programs and graphs are made by then."""

PROMPT = "prompt.json"
"""The tokens of the prompt, beside the files of the models."""


def main(name: str, problem_text: str, file_text: str) -> None:
    """Prepare the file, or serve."""
    problem, file = Problem(**json.loads(problem_text)), Path(file_text)
    runtime = RUNTIMES[name]
    if not file.exists() and runtime.prepare is not None:
        runtime.prepare(problem, file)
        return
    for library in runtime.libraries:
        importlib.import_module(library)
    before = memory()
    session = runtime.load(problem, file)
    loaded = memory()
    prompt = json.loads((file.parent / PROMPT).read_text(encoding="utf-8"))[: problem.prompt]
    for _ in range(3):
        generate(session, prompt, WARM_TOKENS)
    for line in sys.stdin:
        if line.strip() == "go":
            answer(generate(session, prompt, problem.tokens))
        if line.strip() == "memory":
            answer({"before": before, "loaded": loaded, "after": memory()})


def generate(session: Session, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Read the prompt and generate tokens; return the seconds of both."""
    start = time.perf_counter()
    token = session(prompt, 0)
    middle = time.perf_counter()
    for position in range(len(prompt), len(prompt) + tokens):
        token = session([token], position)
    end = time.perf_counter()
    return {"prompt_seconds": middle - start, "token_seconds": (end - middle) / tokens}


def memory() -> dict[str, int]:
    """Return the resident bytes of this process: now, at most, and those of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    kinds = {"resident": "VmRSS", "peak": "VmHWM", "of_files": "RssFile"}
    return {name: 1024 * int(values[key].split()[0]) for name, key in kinds.items()}


def answer(value: dict[str, Any]) -> None:
    """Write a line."""
    print(json.dumps(value), flush=True)


def command(name: str, problem: Problem, file: Path) -> list[str]:
    """Return the command that starts a worker."""
    text = json.dumps(dataclasses.asdict(problem))
    return [sys.executable, "-m", __spec__.name if __spec__ else __name__, name, text, str(file)]


if __name__ == "__main__":
    main(*sys.argv[1:])
