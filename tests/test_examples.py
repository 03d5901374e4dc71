"""The small examples run and show what they say; the text of CONTRIBUTING.md is current."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from fpcompiler import numerics
from fpcompiler.errors import PassError
from fpcompiler.formats import FORMATS
from fpcompiler.passes import PASSES, parse_pipeline, pass_text
from tests.models import normal
from tests.programs import count, quantized, run_passes

ROOT = Path(__file__).parents[1]


def load(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / name))


def test_add_a_format(capsys) -> None:
    example = load("add_a_format.py")
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["f8E5M2FN", "256", "114688", "1.53e-05"]
    assert lines[-1] == "in the table of formats: False"
    spec = example["F8E5M2FN"]
    assert spec.name not in FORMATS
    codes = torch.arange(256, dtype=torch.uint8)
    values = numerics.decode(codes, spec)
    assert torch.equal(values, torch.tensor(spec.values))
    assert torch.equal(numerics.encode(values, spec), codes)


def test_add_a_pass(tmp_path: Path, capsys) -> None:
    load("add_a_pass.py")["main"](tmp_path)
    output = capsys.readouterr().out
    assert "+    %_2.weight" in output
    assert "f8E4M3FN@row:f32" in output
    without, with_it = (
        float(line.split()[3]) for line in output.splitlines() if line.endswith("at the output")
    )
    assert with_it > without + 2
    assert (tmp_path / "06-widen-small.mlir").is_file()


@pytest.mark.parametrize(("outputs", "widened"), [(7, 0), (8, 1), (64, 2)])
def test_the_pass_of_the_example_widens_small_layers_only(outputs: int, widened: int) -> None:
    kind = load("add_a_pass.py")["WidenSmall"]
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
    program = quantized(model, normal(2, 32))
    item = kind(outputs)
    known = {**PASSES, kind.name: kind}
    assert parse_pipeline(pass_text(item), known) == (item,)
    from fpcompiler.passes import run_pipeline

    (result,) = run_pipeline(program, [item])
    assert result.statistics.get("weights widened", 0) == widened
    run_passes(program, "quantize-weights")
    assert count(program, "fpq.assemble") == 2
    with pytest.raises(PassError, match="widen-small needs a program at stage quantized"):
        run_pipeline(program, parse_pipeline("lower-gemm,widen-small", known))


def test_contributing_shows_the_pass_of_the_example() -> None:
    source = (ROOT / "examples/add_a_pass.py").read_text(encoding="utf-8")
    code = source.partition("# The pass: begin\n")[2].partition("# The pass: end")[0].strip()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```python\n{code}\n```" in text
