"""The benchmark of language models: what it says of a record, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.benchmarks.language_model.runtimes import RUNTIMES
from examples.benchmarks.language_model.summary import grown, ratio
from examples.zoo import packages
from fpcompiler.errors import DependencyError

ROOT = Path(__file__).resolve().parents[2]


def record(*rounds: tuple[float, float]) -> dict[str, Any]:
    """Return a record of two runtimes: seconds of a token in each round."""
    return {
        "rounds": [{"a": {"token_seconds": a}, "b": {"token_seconds": b}} for a, b in rounds],
        "memory": {"a": {"before": {"resident": 100}, "after": {"peak": 350}}},
    }


def test_ratios_are_medians_of_those_of_a_round() -> None:
    report = record((2.0, 1.0), (9.0, 3.0), (40.0, 4.0))
    assert ratio(report, "a", "b", "token_seconds") == 3.0
    assert ratio(report, "b", "a", "token_seconds") == pytest.approx(1 / 3)
    assert ratio(report, "a", "c", "token_seconds") is None


def test_memory_counts_from_before_the_model_came() -> None:
    assert grown(record((1.0, 1.0)), "a") == 250


def test_a_runtime_that_is_not_installed_says_what_is_missing(tmp_path: Path) -> None:
    compiled = RUNTIMES["fpcompiler"]
    assert compiled.missing(tmp_path / "none") == ""
    other = type(compiled)("x", "", ("json",), ("no_such_module",), None, compiled.load)
    assert other.missing(tmp_path / "none") == "no_such_module"
    assert other.missing(tmp_path) == ""  # its file is there: nothing has to be prepared


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    try:
        packages.SMOLLM2.path()
    except DependencyError as error:
        pytest.skip(str(error))
    out = tmp_path / "llm.json"
    command = [
        sys.executable, "examples/benchmarks/llm.py", "--quick", "--threads", "1",
        "--runtimes", "fpcompiler", "hf-eager-bf16", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens generated, against transformers in bf16" in done.stdout
    report = json.loads(out.read_text())
    assert set(report["memory"]) == {"fpcompiler", "hf-eager-bf16"}
    assert not report["left_out"]
    assert all(seconds > 0 for seconds in report["rounds"][0]["fpcompiler"].values())
