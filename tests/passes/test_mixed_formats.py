"""The mixed-formats pass: within the budget, better than what it could choose, and reported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import ir, passes, target
from fpcompiler.calibration import Calibration
from fpcompiler.cli.main import main
from fpcompiler.errors import OptionError, PassError
from fpcompiler.passes import METHODS, default_pipeline, parse_pipeline, pipeline_text
from fpcompiler.target import GemmKind, Status, Target
from tests.calibration.runs import CPU
from tests.models import SharedBlock, normal
from tests.passes.test_gptq import calibrated
from tests.passes.test_search_formats import operands
from tests.passes.tiny import Attention, Mlp, tiny
from tests.programs import count, evaluate, quantized

W4 = "w=f4E2M1FN@block16:f8E8M0FNU,a=f6E2M3FN@block32:f8E8M0FNU,skip=none"  # 4.5 bits
W8 = "w=f8E4M3FN@row:f32,a=none,skip=none"  # 9 bits, of rows with 32 values
X = normal(16, 9, 32) ** 3
DATA = Calibration([(X[:8],), (X[8:],)], device=CPU)


class Uneven(nn.Module):
    """Two layers of one shape: what the first gets wrong hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.minor, self.major = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return 0.01 * self.minor(x) + self.major(x)


class Index(nn.Module):
    """Its output is a whole number, which has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(-1)


def chosen(program: ir.Program) -> dict[str, int]:
    """Return the width of each layer's weight."""
    return {name: weight.format.storage_bits for name, (_, weight) in operands(program).items()}


def mixed(model: nn.Module, scheme: str, options: str, data: Calibration = DATA):
    program = quantized(model, X, scheme=scheme)
    (result,) = calibrated(program, f"mixed-formats{{{options}}}", data)
    return program, result


def stored_bits(compiled: fpcompiler.CompiledModel) -> float:
    rows = [row for row in compiled.plan().rows if row.quantized]
    values = sum(row.shape[0] * row.shape[1] for row in rows)
    return 8 * sum(row.bytes_after for row in rows) / values


def compiled_within(bits: float, scheme: str, sensitivity: str = "fisher"):
    options = f"effective_bits={bits} sensitivity={sensitivity}"
    text = (
        f'normalize,fold-constants,insert-quantize{{scheme="{scheme}"}},cse,'
        f"mixed-formats{{{options}}},quantize-weights,lower-gemm"
    )
    return fpcompiler.compile(tiny(Attention), scheme, calibration=[X], pipeline=text)


@pytest.mark.parametrize(("scheme", "bits"), [(W4, 5.2), ("nvfp4,skip=none", 5.7), (W8, 7.3)])
def test_the_bytes_of_the_artifact_are_within_the_budget(scheme: str, bits: float) -> None:
    assert bits - 0.5 < stored_bits(compiled_within(bits, scheme)) <= bits


@pytest.mark.parametrize("sensitivity", ["fisher", "mse"])
def test_more_bits_make_smaller_errors(sensitivity: str) -> None:
    wanted, errors = tiny(Attention)(X).detach(), []
    for bits in (5.0, 6.0, 9.0):
        errors.append(float((compiled_within(bits, W8, sensitivity)(X) - wanted).norm()))
    assert errors[0] > 1.2 * errors[1] > 4 * errors[2]


def test_the_bits_go_where_the_models_output_needs_them() -> None:
    program, _ = mixed(tiny(Uneven), W4, "effective_bits=5.5")
    assert chosen(program) == {"minor": 4, "major": 6}
    program, _ = mixed(tiny(Uneven), W8, "effective_bits=7")
    assert chosen(program) == {"minor": 4, "major": 8}
    # Without derivatives the layers are equally important.
    program, _ = mixed(tiny(Uneven), W8, "effective_bits=7 sensitivity=mse")
    assert chosen(program) == {"minor": 6, "major": 6}


def test_scale_levels_stay_and_formats_given_are_kept_where_widths_are() -> None:
    before = operands(quantized(tiny(Attention), X, scheme=W4))
    for formats in ("given", "same-bits"):
        program, _ = mixed(tiny(Attention), W4, f"effective_bits=5.5 formats={formats}")
        widths = chosen(program)
        assert set(widths.values()) > {4}
        for name, (x, weight) in operands(program).items():
            assert (x, weight.levels) == (before[name][0], before[name][1].levels)
            if formats == "given" and widths[name] == 4:
                assert weight == before[name][1]
        evaluate(program, X)


def test_notes_and_statistics_say_what_was_chosen() -> None:
    program, result = mixed(tiny(Uneven), W4, "effective_bits=5.5 formats=given")
    minor, major = program.operations("fpq.linear")
    assert "fpq.note" not in minor.attributes
    note = str(major.attributes["fpq.note"])
    assert re.fullmatch(r'"E\dM\d instead of E2M1: \d+% of the predicted damage"', note)
    assert result.statistics["weights that another format was chosen for"] == 1
    assert result.statistics["weights in f4E2M1FN"] == 1


def test_the_report_is_a_table_with_the_chosen_row_marked() -> None:
    _, result = mixed(tiny(Attention), W4, "effective_bits=6")
    rows = [line.strip("| ").split(" | ") for line in result.report.splitlines() if "|" in line]
    points = [row for row in rows[2:] if row[-1] != "the scheme as it is"]
    bits, damages = ([float(row[i].rstrip("%")) for row in points] for i in (0, 1))
    assert bits == sorted(bits)
    assert damages == sorted(damages, reverse=True)
    assert bits[0] == 4.5
    assert all(sum(map(int, row[2:5])) == 4 for row in rows[2:])
    (mark,) = [row for row in rows if row[-1] == "chosen"]
    assert 5.5 <= float(mark[0]) <= 6
    assert rows[-1] == ["4.500", "100.00%", "4", "0", "0", "the scheme as it is"]


def test_a_budget_below_the_narrowest_is_refused_with_the_least_that_can_be() -> None:
    with pytest.raises(PassError, match=r"effective_bits=4.25 cannot be reached: .* it is 4.500"):
        mixed(tiny(Attention), W4, "effective_bits=4.25")
    program, _ = mixed(tiny(Attention), W4, "effective_bits=4.5")
    assert set(chosen(program).values()) == {4}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("effective_bits=3.9", "effective_bits must be from 4 to 10, .* 3.9"),
        ("effective_bits=-1", "effective_bits must be from 4 to 10"),
        ("effective_bits=nan", "effective_bits must be from 4 to 10"),
        ("effective_bits=11", "effective_bits must be from 4 to 10"),
        ("effective_bits=much", "effective_bits must be float, not 'much'"),
        ("sensitivity=hessian", "sensitivity must be one of fisher, mse: 'hessian'"),
        ("formats=all", "formats must be one of same-bits, given: 'all'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: str, match: str) -> None:
    with pytest.raises(PassError, match=match):
        parse_pipeline(f"mixed-formats{{{options}}}")


def test_it_needs_data_and_weights_that_are_not_searched_yet() -> None:
    program = quantized(tiny(Mlp), normal(8, 32), scheme=W4)
    with pytest.raises(PassError, match="mixed-formats needs calibration data"):
        passes.run_pipeline(program, parse_pipeline("mixed-formats"))
    data = Calibration([(normal(8, 32),)], device=CPU)
    with pytest.raises(PassError, match="put mixed-formats before search-formats"):
        calibrated(program, "search-formats,mixed-formats{effective_bits=6}", data)


def test_a_model_without_derivatives_is_told_to_use_mse() -> None:
    with pytest.raises(PassError, match="Use sensitivity=mse"):
        mixed(tiny(Index), W4, "effective_bits=7")
    program, _ = mixed(tiny(Index), W4, "effective_bits=7 sensitivity=mse")
    assert chosen(program) == {"layer": 6}


def test_a_weight_with_several_inputs_keeps_its_format_and_counts() -> None:
    x = normal(4, 9, 64)
    program = quantized(SharedBlock().eval(), x, scheme=W4)
    before = chosen(program)
    data = Calibration([(x,)], device=CPU)
    shared = {op.operands[1] for op in program.operations("fpq.linear")}
    assert len(shared) < count(program, "fpq.linear")
    (result,) = calibrated(program, "mixed-formats{effective_bits=9}", data)
    assert chosen(program) == {**before, "between": 8}  # the one layer with an input of its own
    assert "Weights that keep their format count" in result.report
    with pytest.raises(PassError, match=r"cannot be reached: .* it is 4\.500"):
        calibrated(program, "mixed-formats{effective_bits=4.4}", data)


def test_what_the_target_cannot_run_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = GemmKind("k", ("f4E2M1FN", "f6E3M2FN"), ("f6E2M3FN",), ("",), 1, "none", "none")
    row = Target("narrow", "none", Status.UNAVAILABLE, (kind,))
    table: Mapping[str, Target] = MappingProxyType({**target.TARGETS, "narrow": row})
    monkeypatch.setattr(target, "TARGETS", table)
    program, _ = mixed(
        tiny(Attention),
        "w=f4E2M1FN@row:f32,a=f6E2M3FN@token:f32,skip=none",
        "effective_bits=9 target=narrow",
    )
    assert {w.format.name for _, w in operands(program).values()} == {"f6E3M2FN"}


def test_budgets_share_the_work_in_a_folder(tmp_path: Path) -> None:
    data = Calibration(DATA.batches, device=CPU, folder=tmp_path)
    for bits in (5, 6):
        mixed(tiny(Attention), W4, f"effective_bits={bits}", data)
    assert len(list(tmp_path.iterdir())) == 1


def test_it_stands_before_the_method_in_the_default_pipeline() -> None:
    text = pipeline_text(default_pipeline("w4a6", method="search-gptq", effective_bits=5))
    assert "cse,mixed-formats{effective_bits=5},search-formats,gptq,quantize-weights" in text
    assert "mixed-formats" not in pipeline_text(default_pipeline("w4a6"))
    assert parse_pipeline(text) == default_pipeline("w4a6", method="search-gptq", effective_bits=5)


@pytest.mark.filterwarnings("ignore:The method")  # smooth finds little to do
@pytest.mark.parametrize("method", ["search", "gptq", "smooth"])
def test_methods_keep_the_widths(method: str) -> None:
    model = tiny(Attention)
    assert METHODS[method].needs_data
    compiled = fpcompiler.compile(model, W4, calibration=[X], method=method, effective_bits=5.6)
    assert 5.0 <= stored_bits(compiled) <= 5.6
    assert compiled.artifact.recipe["effective_bits"] == 5.6


def test_compile_reports_and_dumps_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    compiled = fpcompiler.compile(
        tiny(Attention), W4, calibration=[X], effective_bits=6, dump_dir=folder
    )
    report = compiled.reports["mixed-formats"]
    assert (folder / "06-mixed-formats.md").read_text() == report
    assert "| chosen |" in report
    assert any("of the predicted damage" in row.reason for row in compiled.plan().rows)
    compiled.save(tmp_path / "model.fpc")
    assert fpcompiler.load(tmp_path / "model.fpc").reports == {"mixed-formats": report}
    # Dumps of before are deleted with the rest.
    plain = fpcompiler.compile(tiny(Attention), W4, example_inputs=X, dump_dir=folder)
    assert not list(folder.glob("*.md"))
    assert plain.reports == {}


def test_compile_refuses_what_cannot_be(tmp_path: Path) -> None:
    model = tiny(Attention)
    with pytest.raises(OptionError, match=r"effective_bits .*give calibration=batches"):
        fpcompiler.compile(model, W4, example_inputs=X, effective_bits=6)
    with pytest.raises(OptionError, match=r"effective_bits must be a number such as 4\.5, not"):
        fpcompiler.compile(model, W4, calibration=[X], effective_bits="6")
    with pytest.raises(OptionError, match="leave out method=, attention=, effective_bits="):
        fpcompiler.compile(model, W4, calibration=[X], effective_bits=6, pipeline="cse")
    with pytest.raises(PassError, match="effective_bits must be from 4 to 10"):
        fpcompiler.compile(model, W4, calibration=[X], effective_bits=0)


MODELS = """
import torch
from torch import nn

def batches():
    return [torch.randn(8, 32, generator=torch.Generator().manual_seed(0))]

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval(), tuple(batches())
"""


def test_the_command_line_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    command = ["compile", "mixed_models:model", "-o", "m.fpc", "--effective-bits", "6.5"]
    assert main([*command, "--calibration", "mixed_models:batches"]) == 0
    assert "# Mixed formats for 6.5 bits a weight" in capsys.readouterr().out
    assert main([*command, "--calibration", "mixed_models:batches", "--json"]) == 0
    assert "| chosen |" in json.loads(capsys.readouterr().out)["reports"]["mixed-formats"]
    assert main(["inspect", "m.fpc"]) == 0
    assert re.search(r"effective_bits +6\.5", capsys.readouterr().out)
    assert main(command) == 1
    assert "--calibration" in capsys.readouterr().err


def test_it_runs_on_a_model_in_bf16() -> None:
    x = X.bfloat16()
    model = tiny(Attention).bfloat16()
    compiled = fpcompiler.compile(model, W4, calibration=[x], effective_bits=6)
    assert stored_bits(compiled) <= 6
    assert bool(torch.isfinite(compiled(x)).all())
