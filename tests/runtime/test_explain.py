"""What is predicted of the layers of a compiled model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.kernels import INDEX, KernelIndex, LayerKernels, TargetKernels
from fpcompiler.cli.main import main
from fpcompiler.errors import OptionError, RunError
from fpcompiler.operand import Operand
from fpcompiler.runtime.costs import LayerCall, Prediction, predict
from fpcompiler.runtime.explain import ExplainTable, explain


class Mixed(nn.Module):
    """Two layers that share an input, one of their own, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 64, 1)
        self.a, self.b = nn.Linear(64, 128), nn.Linear(64, 128)
        self.down, self.lm_head = nn.Linear(128, 256), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.lm_head(self.down(self.a(x) * self.b(x)))


@pytest.fixture(scope="module")
def model() -> fpcompiler.CompiledModel:
    torch.manual_seed(0)
    return fpcompiler.compile(
        Mixed().eval().bfloat16(),
        "w4a6-row; down: mxfp8",
        example_inputs=torch.randn(1, 4, 5).bfloat16(),
    )


def by_name(table: ExplainTable) -> dict[str, Any]:
    return {row.layer: row for row in table.rows}


def test_each_layer_has_its_prediction(model: fpcompiler.CompiledModel) -> None:
    table = model.explain("sm_90a", (1, 500))
    rows = by_name(table)
    assert [*rows] == ["conv", "a", "b", "down", "lm_head"]
    weight, activation = Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32")
    for m, time in zip((1, 500), rows["a"].times, strict=True):
        assert time == predict(
            "sm_90a", LayerCall(m, 128, 64, weight, activation, together=(128, 128))
        )
    assert rows["a"].times == rows["b"].times
    assert (rows["a"].n, rows["a"].k) == (128, 64)


def test_what_is_not_predicted_says_why(model: fpcompiler.CompiledModel) -> None:
    rows = by_name(model.explain("sm_90a"))
    assert (rows["conv"].times, rows["conv"].note) == ((), "a convolution is not one product")
    assert rows["down"].times == ()
    assert rows["down"].note.startswith("no times of w=f8E4M3FN@block32")
    head = rows["lm_head"]
    assert (head.n, head.k, head.quantized) == (8, 256, False)
    assert head.note == "the scheme keeps it in high precision"
    assert [time.speed for time in head.times] == [1.0] * 3


def test_slower_ones_are_marked(model: fpcompiler.CompiledModel) -> None:
    torch.manual_seed(0)
    small = fpcompiler.compile(
        nn.Sequential(nn.Linear(64, 64)).eval(), "nvfp4", example_inputs=torch.randn(2, 64)
    )
    (row,) = small.explain("sm_90a", (1, 16)).rows
    assert row.slower == (True, True)
    assert row.note == "slower than bf16 with M = 1, 16"


def test_the_totals_are_sums(model: fpcompiler.CompiledModel) -> None:
    table = model.explain("sm_90a", (1, 16))
    times = [row.times[0] for row in table.rows if row.times]
    assert len(times) == 3
    assert table.totals[0].microseconds == pytest.approx(sum(t.microseconds for t in times))
    assert table.totals[0].bf16_microseconds == pytest.approx(
        sum(t.bf16_microseconds for t in times)
    )
    assert table.summary.startswith("layers on sm_90a, against bf16 (predicted): M = 1: ")
    empty = replace(table, rows=tuple(row for row in table.rows if not row.times))
    assert empty.totals == ()
    assert empty.summary.endswith("no layer has a prediction")
    assert "all of these" in str(empty)


def test_the_table_says_what_it_is(model: fpcompiler.CompiledModel) -> None:
    text = " ".join(str(model.explain("sm_90a")).split())
    assert "predicted times on sm_90a" in text
    assert "(NVIDIA H100, H200): microseconds of a layer, predicted from times of layers" in text
    assert "slower: below 0.95" in text
    assert "M = 2,048" in text
    estimate = " ".join(str(model.explain("sm_100a")).split())
    assert "estimated, never measured: times on sm_100a" in estimate
    assert "estimated from the data sheet of an NVIDIA B200, never measured" in estimate


def test_layers_without_a_kernel_run_as_the_reference(model: fpcompiler.CompiledModel) -> None:
    target = TargetKernels("sm_90a", ("9.0",), {}, {}, {"a": LayerKernels(reason="too long")})
    files = {INDEX: jsonfile.dump(KernelIndex({"sm_90a": target}).to_json())}
    artifact = replace(model.artifact, kernels=files, targets=("cpu", "sm_90a"))
    rows = by_name(explain(artifact))
    assert rows["a"].note == "no kernel, runs as the reference: too long"
    assert rows["a"].times == ()
    assert rows["b"].times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "the model was compiled for cpu: say for which GPU times are wanted, such as 'sm_90a'",
        ),
        (("sm_80",), "there are no times for 'sm_80'; for sm_90a, sm_100a, sm_120a there are"),
        (("sm_90a", ()), r"tokens=\(\) must be numbers"),
        (("sm_90a", (1, 0)), "must be numbers of at least 1"),
        (("sm_90a", (True,)), "must be numbers of at least 1"),
    ],
)
def test_errors(model: fpcompiler.CompiledModel, arguments: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        model.explain(*arguments)


def test_a_model_that_is_not_compiled_yet_has_no_layers() -> None:
    with pytest.raises(RunError, match="captured by its first call"):
        fpcompiler.compile(nn.Linear(8, 8)).explain("sm_90a")


def test_inspect_shows_it(
    model: fpcompiler.CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "m.fpc")
    model.save(path)
    assert main(["inspect", path]) == 0
    assert "times on" not in capsys.readouterr().out
    assert main(["inspect", path, "--gpu", "sm_90a", "--tokens", "1,77"]) == 0
    assert "M = 77" in capsys.readouterr().out
    assert main(["inspect", path, "--gpu", "sm_90a", "--json"]) == 0
    times = json.loads(capsys.readouterr().out)["times"]
    assert (times["gpu"], times["measured"], times["tokens"]) == ("sm_90a", True, [1, 16, 2048])
    assert {*times["rows"][1]["times"][0]} == {
        "tokens", "microseconds", "bf16_microseconds", "speed", "slower",
    }  # fmt: skip
    assert times["rows"][0]["times"] == []
    assert main(["inspect", path, "--gpu", "sm_90a", "--tokens", "1;2"]) == 1
    assert "--tokens 1;2 must be numbers with commas" in capsys.readouterr().err
    assert main(["inspect", path, "--tokens", "1"]) == 1
    assert "say for which GPU" in capsys.readouterr().err


def test_a_prediction_compares_with_bf16() -> None:
    assert Prediction(2.0, 3.0).speed == 1.5
