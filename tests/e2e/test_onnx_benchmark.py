"""The benchmark of ONNX files: what it measures of MiniLM, and what is on record of all models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fpcompiler.errors import DependencyError

for module in ("torch_mlir", "transformers", "tokenizers", "onnxscript", "onnxruntime"):
    pytest.importorskip(module)

from examples.zoo import packages  # noqa: E402

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "examples" / "benchmarks" / "results" / "interop_onnx.json"


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    try:
        packages.MINILM.path(), packages.LEE_TEXTS.path()
    except DependencyError as error:
        pytest.skip(str(error))
    command = [sys.executable, "examples/benchmarks/interop_onnx.py", "--models", "minilm"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(json.loads((tmp_path / RECORD.name).read_text())["models"]["minilm"])


def check(model: dict) -> None:
    """Every quantization, product and weight of both styles is that of the artifact."""
    for part in model["parts"].values():
        for style in ("portable", "standard"):
            row, steps = part[style], part[style]["steps"]
            assert steps["bit_equal"] == steps["quantizations"] > 0
            assert steps["products"] > 0
            assert steps["largest_error_to_bound"] <= 1
            assert row["weights"]["bit_equal"] == row["weights"]["weights"] > 0
            if row["netron"] is not None:
                assert row["netron"]["errors"] == []
                assert row["netron"]["nodes"] == row["operations"]


@pytest.mark.parametrize("name", ["smollm2", "minilm", "dinov2", "whisper"])
def test_what_is_on_record(name: str) -> None:
    check(json.loads(RECORD.read_text())["models"][name])
