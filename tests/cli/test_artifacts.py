"""compile, inspect, verify and run, one after the other on a small model."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fpcompiler.artifact import Artifact
from fpcompiler.cli import inspect
from fpcompiler.cli.main import main
from fpcompiler.runtime.loading import load
from tests.runtime.test_state import READ, WRITE, plan

ROOT = Path(__file__).parents[2]

MODELS = '''
"""Models for `fpcompiler compile small_models:NAME`."""
import torch

class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(48, 96), torch.nn.Linear(96, 48)
        self.lm_head = torch.nn.Linear(48, 24)

    def forward(self, x, mask=None):
        y = self.down(torch.relu(self.up(x)))
        return {"logits": self.lm_head(y if mask is None else y * mask), "hidden": y}

def gated():
    torch.manual_seed(0)
    return Gated(), {"x": torch.randn(3, 48), "mask": torch.ones(3, 1)}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an artifact, made by the command itself."""
    path = tmp_path_factory.mktemp("cli")
    (path / "small_models.py").write_text(MODELS)
    before = Path.cwd()
    os.chdir(path)
    try:
        arguments = ["small_models:gated", "-o", "m.fpc", "--dump-dir", "dumps"]
        assert main(["compile", *arguments, "--scheme", "w4a6; down: w4a8"]) == 0
    finally:
        os.chdir(before)
    return path


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_compile_reports_as_json(capsys) -> None:
    code = main(["compile", "small_models:gated", "-o", "j.fpc", "--scheme", "w4a16", "--json"])
    assert code == 0
    data = json.loads(capsys.readouterr().out)
    assert data["artifact"] == "j.fpc"
    assert data["bytes"] == Path("j.fpc").stat().st_size
    assert [row["quantized"] for row in data["rows"]] == [True, True, False]
    assert data["scheme"].startswith("w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=none,skip=lm_head|")
    assert data["dumps"] is None


def test_compile_takes_a_recipe_and_an_example_call(capsys) -> None:
    Path("recipe.yaml").write_text("{scheme: nvfp4, skip: [], rules: [{match: up, skip: true}]}")
    safetensors.torch.save_file({"x": torch.randn(2, 48)}, "call.safetensors")
    arguments = ["--recipe", "recipe.yaml", "--inputs", "call.safetensors"]
    assert main(["compile", "small_models:gated", "-o", "r.fpc", *arguments]) == 0
    assert "layers: 2 of 3 quantized" in capsys.readouterr().out
    assert load("r.fpc")(torch.randn(5, 48))["logits"].shape == (5, 24)


def test_compile_warns_of_a_mistyped_rule(capsys) -> None:
    scheme = "w4a6; dwon: w4a8; up: skip"
    assert main(["compile", "small_models:gated", "-o", "w.fpc", "--scheme", scheme]) == 0
    assert capsys.readouterr().err == "warning: no layer matches the rule for 'dwon'\n"


def test_caches_are_no_weights() -> None:
    tensors = {"cache": torch.zeros(4, 3), "w": torch.ones(5)}
    facts = inspect._facts(Artifact(plan(WRITE, READ), tensors), 100)
    assert (facts["weight_bytes"], facts["state_bytes"]) == (20, 48)


def test_inspect_shows_scheme_plan_and_sizes(capsys) -> None:
    assert main(["inspect", "m.fpc", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bytes"] == Path("m.fpc").stat().st_size
    assert data["weight_bytes"] > 0
    assert data["state_bytes"] == 0
    assert data["targets"] == ["cpu"]
    assert (data["method"], data["attention"]) == ("rtn", None)
    assert [name for name, _, _ in data["inputs"]] == ["x", "mask"]
    rows = {row["name"]: row for row in data["plan"]["rows"]}
    assert rows["down"]["activation"] == "f8E4M3FN@block32:f8E8M0FNU"
    assert not rows["lm_head"]["quantized"]
    assert main(["inspect", "m.fpc"]) == 0
    text = capsys.readouterr().out
    assert "down: w=f4E2M1FN" in text
    assert re.search(r"method +rtn\n", text)
    assert "lm_head" in text


def test_verify_accepts_the_artifact_and_refuses_a_damaged_one(capsys) -> None:
    assert main(["verify", "m.fpc"]) == 0
    assert "failed" not in capsys.readouterr().out
    data = bytearray(Path("m.fpc").read_bytes())
    data[len(data) // 2] ^= 1
    Path("damaged.fpc").write_bytes(data)
    assert main(["verify", "damaged.fpc"]) == 1
    assert "error: damaged.fpc is not a usable artifact" in capsys.readouterr().err
    assert main(["verify", "damaged.fpc", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert "damaged.fpc" in report["error"]


def test_verify_exits_with_1_when_a_check_fails(capsys, monkeypatch) -> None:
    from fpcompiler.runtime import verify

    monkeypatch.setattr(verify, "GOLDEN_DB", float("nan"))  # nothing is above it
    assert main(["verify", "m.fpc", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert any(row["result"] == "failed" for row in report["rows"])


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_run_gives_what_the_loaded_model_gives(capsys, suffix) -> None:
    x, mask = torch.randn(4, 48), torch.ones(4, 1)
    safetensors.torch.save_file({"x": x, "mask": mask}, "in.safetensors")
    out = f"out.{suffix}"
    assert main(["run", "m.fpc", "--inputs", "in.safetensors", "--output", out, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["logits", "hidden"]
    from fpcompiler.cli.tensors import read_tensors

    expected, written = load("m.fpc")(x, mask=mask), read_tensors(out)
    assert all(torch.equal(written[name], expected[name]) for name in ("logits", "hidden"))


def test_run_with_a_made_up_call_is_repeatable(capsys) -> None:
    outputs = []
    for _ in range(2):
        assert main(["run", "m.fpc", "--random"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "logits" in outputs[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "missing.npz"], "there is no file missing.npz"),
        (["--random", "--output", "out.txt"], "end with .safetensors or .npz"),
        (["--random", "--device", "warp"], "'warp' is no device"),
    ],
)
def test_run_refuses_what_it_cannot_use(capsys, arguments, message) -> None:
    assert main(["run", "m.fpc", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_run_refuses_inputs_that_do_not_fit(capsys) -> None:
    safetensors.torch.save_file(
        {"x": torch.ones(4, 47), "mask": torch.ones(4, 1)}, "bad.safetensors"
    )
    assert main(["run", "m.fpc", "--inputs", "bad.safetensors"]) == 1
    assert "error: " in capsys.readouterr().err


def test_opt_reruns_a_pipeline_on_a_dump(capsys) -> None:
    first = min(Path("dumps").glob("*.mlir"))
    assert main(["opt", str(first), "-p", "canonicalize,cse"]) == 0
    text = capsys.readouterr().out
    assert main(["opt", str(first), "-p", "canonicalize,cse", "-o", "after.mlir"]) == 0
    assert Path("after.mlir").read_text() == text
    assert main(["opt", "after.mlir", "-p", "canonicalize,cse"]) == 0
    assert capsys.readouterr().out == text
    assert main(["opt", str(first), "-p", "no-such-pass"]) == 1
    assert "no-such-pass" in capsys.readouterr().err


def test_list_passes_describes_each(capsys) -> None:
    from fpcompiler.passes import PASSES

    assert main(["opt", "--list-passes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PASSES)


def on_a_terminal(*arguments: str) -> str:
    """Run a command with a terminal as its stdout and stderr, and return what it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fpcompiler", *arguments],
        stdout=theirs, stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = bytearray()
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # How Linux reports that the other side of a terminal has closed.
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    return shown.decode()


def test_progress_is_shown_on_a_terminal_and_nowhere_else(capsys) -> None:
    assert "verifying" in on_a_terminal("verify", "m.fpc")
    assert main(["verify", "m.fpc"]) == 0
    assert capsys.readouterr().err == ""
