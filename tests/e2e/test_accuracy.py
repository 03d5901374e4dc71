"""The accuracy benchmark measures artifacts in a fresh process, and records what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fpcompiler.errors import DependencyError

for module in ("torch_mlir", "transformers", "tokenizers", "onnx", "PIL"):
    pytest.importorskip(module)

from examples.zoo import packages  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "benchmarks" / "results"


def test_minilm_and_its_record(tmp_path: Path) -> None:
    try:
        packages.MINILM.path(), packages.LEE_TEXTS.path()
    except DependencyError as error:
        pytest.skip(str(error))
    command = [sys.executable, "examples/benchmarks/accuracy.py", "--models", "minilm"]
    command += ["--schemes", "w4a16", "--simulate", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "w4a16" in done.stdout
    report = json.loads((tmp_path / "accuracy-minilm.json").read_text())
    (row,) = report["schemes"]
    assert row["metrics"] == pytest.approx(row["simulation"], rel=1e-4)
    assert row["fresh_process"]["imported"] == []
    assert row["quantized_bytes_ratio_to_bf16"] < 0.30
    recorded = json.loads((RESULTS / "accuracy-minilm.json").read_text())
    (before,) = (old for old in recorded["schemes"] if old["name"] == "w4a16")
    assert row["metrics"] == pytest.approx(before["metrics"], rel=0.01)


@pytest.mark.parametrize("model", ["smollm2", "minilm", "dinov2", "whisper"])
def test_recorded_metrics_agree_with_the_simulation(model: str) -> None:
    report = json.loads((RESULTS / f"accuracy-{model}.json").read_text())
    named = {row["name"]: row for row in report["schemes"]}
    for name in ("w4a16", "w4a8", "w4a6", "w4a6-row", "w4a4", "nvfp4", "mxfp4"):
        assert named[name]["quantized_bytes_ratio_to_bf16"] <= 0.30
        assert named[name]["fresh_process"]["imported"] == []
    # Rounded weights alone: everything agrees. Rounded activations spread, see the other test.
    for name in ("w4a16", "W block32", "W row"):
        assert named[name]["metrics"] == pytest.approx(named[name]["simulation"], rel=0.01)
