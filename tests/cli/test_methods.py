"""``compile`` with methods that learn from data, and the list of methods."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch

from fpcompiler.cli.main import main
from fpcompiler.runtime.loading import load
from tests.models import normal

MODELS = """
import torch

def mlp():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64)]
    return torch.nn.Sequential(*layers), (torch.randn(4, 64),)

def batches():
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(64, 64, generator=generator)  # GPTQ lives on what inputs have in common
    return [torch.randn(80, 64, generator=generator) @ mixed for _ in range(4)]

def broken():
    yield torch.randn(32, 64)
    raise KeyError("row 17")

def absent():
    return undefined
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "learned_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "learned_models", raising=False)


def compile_mlp(*options: str) -> int:
    return main(["compile", "learned_models:mlp", "-o", "m.fpc", "--scheme", "w4a4", *options])


def test_batches_come_from_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_mlp("--method", "rotate-gptq", "--calibration", "learned_models:batches") == 0
    assert "2 of 2 quantized" in capsys.readouterr().out
    steps = [step.op for step in load("m.fpc").artifact.plan.steps]
    assert steps.count("fpc.hadamard") == 2


def test_batches_come_from_files_and_a_run_can_go_on() -> None:
    for number in range(2):
        x = normal(160, 64, seed=number) @ normal(64, 64, seed=2)
        safetensors.torch.save_file({"0": x}, f"{number}.safetensors")
    options = ["--calibration", "0.safetensors", "1.safetensors", "--work-dir", "work"]
    assert compile_mlp("--method", "gptq", *options, "--max-memory", "1GiB", "--seed", "3") == 0
    first = Path("m.fpc").read_bytes()
    assert compile_mlp("--method", "gptq", *options, "--max-memory", "1GiB", "--seed", "3") == 0
    assert Path("m.fpc").read_bytes() == first
    left = list(Path("work").rglob("*.safetensors"))
    assert left
    assert sum(path.stat().st_size for path in left) < len(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "the method gptq learns from data"),
        (["--method", "gtpq"], "Did you mean gptq?"),
        (["--method", "gptq", "--calibration", "no.npz"], "no.npz"),
        (["--calibration", "learned_models:batches", "--max-memory", "much"], "no amount"),
        (
            ["--calibration", "learned_models:broken"],
            "error: calibration batch 2 cannot be drawn: KeyError: 'row 17'. Iterate over",
        ),
        (
            ["--calibration", "learned_models:absent"],
            "error: learned_models:absent() failed: NameError: name 'undefined' is not defined.",
        ),
        (["--attention", "f8E4M3FN@token:f32"], "no attention"),
    ],
)
def test_what_is_wrong_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_mlp(*options) == 1
    assert message in capsys.readouterr().err
    assert not Path("m.fpc").exists()


@pytest.mark.filterwarnings("always")
def test_a_method_that_changes_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "smooth", "--calibration", "learned_models:batches"]
    assert compile_mlp(*options, "--scheme", "w4a16") == 0
    assert capsys.readouterr().err == (
        "warning: The method smooth: smooth changed nothing in this model (groups of layers not "
        "smoothed: 2). It is for quantized inputs with large channels; for weights take gptq or "
        "rotate-gptq.\n"
    )
    assert load("m.fpc").artifact.recipe["method"] == "smooth"


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["rtn"]["needs_data"] == "no"
    assert rows["search-gptq"]["passes"] == "search-formats,gptq"
