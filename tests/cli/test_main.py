"""The command line as a whole: help, exit codes, errors, and what it does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fpcompiler
from fpcompiler.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fpcompiler", *args],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, check=False,
    )  # fmt: skip


def test_help_lists_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command.name} " in text for command in COMMANDS)


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fpcompiler {fpcompiler.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_of_a_command_has_an_example_that_parses(command, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command.name, "--help"])
    assert stopped.value.code == 0
    assert command.example.strip() in capsys.readouterr().out
    assert command.example.startswith(f"  fpcompiler {command.name}")


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from fpcompiler.cli.main import main\n"
        "try: main(['compile', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'rich', 'yaml', 'torch_mlir', 'transformers'} & {*sys.modules}\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "args", [[], ["unknown"], ["compile", "x"], ["run", "m.fpc"], ["opt"], ["opt", "x.mlir"]]
)
def test_a_wrong_call_exits_with_2(args, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert "usage: fpcompiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compile", "x.pt2", "--scheme", "w4a7", "-o", "m.fpc"], "There is no scheme 'w4a7'"),
        (["compile", "x.pt2", "--target", "gpu", "-o", "m.fpc"], "There is no target 'gpu'"),
        (["compile", "x.pt2", "--recipe", "no.yaml", "-o", "m.fpc"], "cannot read the recipe"),
        (["compile", "x.pt2", "-o", "missing/m.fpc"], "the folder of missing/m.fpc does not exist"),
        (["compile", "x.pt2", "-o", "m.fpc"], "there is no file x.pt2"),
        (["verify", "missing.fpc"], "missing.fpc is not a usable artifact"),
        (["inspect", "missing.fpc"], "missing.fpc is not a usable artifact"),
        (["opt", "missing.mlir", "-p", "cse"], "missing.mlir"),
    ],
)
def test_errors_are_one_message_and_exit_with_1(args, message, capsys) -> None:
    assert main(args) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_notes_of_an_error_are_shown(tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schema: w4a6")
    assert main(["compile", "x.pt2", "--recipe", str(recipe), "-o", "m.fpc"]) == 1
    assert f"\nin the recipe {recipe}\n" in capsys.readouterr().err


def test_debug_logging_shows_the_traceback() -> None:
    result = run("compile", "x.pt2", "--scheme", "w4a7", "-o", "m.fpc", FPC_LOGS="debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "no scheme 'w4a7'" in result.stderr


def test_a_bad_environment_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FPC_PROGRESS", "perhaps")
    assert main(["formats"]) == 1
    assert "error: FPC_PROGRESS='perhaps'" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        process = subprocess.run(
            [sys.executable, "-m", "fpcompiler", "formats"],
            stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr == ""


def test_output_without_a_terminal_is_plain() -> None:
    result = run("formats")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert "f4E2M1FN" in result.stdout
    assert "…" not in result.stdout


def test_formats_as_json(capsys) -> None:
    assert main(["formats", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    by_name = {row["name"]: row for row in data["formats"]}
    assert by_name["f4E2M1FN"]["largest"] == 6.0
    assert by_name["f8E4M3FN"]["special_codes"] == "NaN"
    assert [row["name"] for row in data["schemes"]][:3] == ["w4a16", "w4a8", "w4a6"]


def test_targets_say_what_was_done_with_their_kernels(capsys) -> None:
    assert main(["targets", "--json"]) == 0
    status = {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert status.pop("reference") == status.pop("cpu") == status.pop("sm_90a") == "executed"
    assert set(status.values()) == {"compiled-only"}
    assert main(["targets"]) == 0
    assert "kind::mxf8f6f4" in capsys.readouterr().out
