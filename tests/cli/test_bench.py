"""``fpcompiler bench``: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fpcompiler.artifact import save
from fpcompiler.cli.main import main
from tests.plans import mlp_artifact, with_golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    save(path / "m.fpc", with_golden(mlp_artifact(), x))
    save(path / "unrecorded.fpc", mlp_artifact())
    safetensors.torch.save_file({"0": torch.ones(3, 64)}, path / "by_position.safetensors")
    safetensors.torch.save_file({"x": torch.ones(3, 63)}, path / "bad.safetensors")
    return path


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def bench(*arguments: str) -> int:
    return main(["bench", "m.fpc", "--iterations", "3", *arguments])


def test_it_prints_tables_and_writes_a_trace_and_json(capsys) -> None:
    assert bench("--trace", "trace.json", "--json", "result.json", "--top", "2") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for words in (
        "5 a call", "items/s at the median latency", "p50 ", "p90 ", "p99 ", "over 3 calls",
        "peak ", "reset before each call", "quantized GEMM", "interpreter", "time by operator",
        "more rows take", "roofline of the quantized layers", "5 x 96 x 64", "loading had made",
        "in native kernels", "between steps (Python); steps run one by one",
    ):  # fmt: skip
        assert words in shown.out
    data = json.loads(Path("result.json").read_text())
    assert data["file"] == "m.fpc"
    assert data["latency"]["calls"] == 3
    assert data["memory"]["loading"] is not None
    assert len(data["operators"]) > 2
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    assert {"call 0", "fpc.linear"} <= {event["name"] for event in events}


def test_json_without_a_file_is_all_that_is_printed(capsys) -> None:
    assert bench("--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["inputs"] == ["x float32 [5, 64]"]


def test_the_call_can_be_given_or_its_sizes(capsys) -> None:
    for arguments, shape in (
        (["--inputs", "by_position.safetensors"], [3, 64]),
        (["--size", "s0=9"], [9, 64]),
    ):
        assert bench(*arguments, "--json") == 0
        assert json.loads(capsys.readouterr().out)["inputs"] == [f"x float32 {shape}"]


def test_without_a_recorded_call_one_is_made_up(capsys) -> None:
    assert main(["bench", "unrecorded.fpc", "--seconds", "0.01", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["inputs"] == ["x float32 [16, 64]"]
    assert data["latency"]["calls"] >= 3


def test_threads_are_those_asked_for_and_are_put_back(capsys) -> None:
    before = torch.get_num_threads()
    assert bench("--threads", "2", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["threads"], data["ceilings"]["threads"]) == (2, 2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "missing.npz"], "there is no file missing.npz"),
        (["--inputs", "bad.safetensors"], "Argument 'x': expected the shape"),
        (["--size", "s9=4"], "no size 's9' that varies; it has s0 (axis 0 of x)"),
        (["--size", "s0=65"], "s0 must be from 1 to 64, not 65"),
        (["--trace", "missing/trace.json"], "the folder of missing/trace.json does not exist"),
        (["--json", "missing/result.json"], "the folder of missing/result.json does not exist"),
        (["--device", "warp"], "'warp' is no device"),
    ],
)
def test_it_refuses_what_it_cannot_use(capsys, arguments, message) -> None:
    assert bench(*arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "s0"], ["--size", "s0=-1"], ["--threads", "0"], ["--top", "none"],
        ["--seconds", "2", "--iterations", "3"], ["--size", "s0=2", "--inputs", "a.npz"],
    ],
)  # fmt: skip
def test_a_wrong_call_exits_with_2(capsys, arguments) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "m.fpc", *arguments])
    assert stopped.value.code == 2
    assert "usage: fpcompiler bench" in capsys.readouterr().err
