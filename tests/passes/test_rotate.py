"""The rotate pass: outputs stay what they were, and layers of one input share one transform."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import ir
from fpcompiler.calibration.float_graph import raise_without_quantization
from fpcompiler.errors import PassError
from fpcompiler.numerics.hadamard import hadamard
from fpcompiler.passes import parse_pipeline
from tests.calibration.runs import program_for
from tests.models import cases, normal
from tests.passes.tiny import Attention, Mlp, tiny
from tests.programs import count, leaves_of, quantized, run_passes

WEIGHT_ONLY = "w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=none,skip=none"


def unquantized(program: ir.Program, inputs: list[Tensor]) -> list[Tensor]:
    """Return the results of a program that quantizes nothing."""
    module, _ = raise_without_quantization(program, [])
    with torch.no_grad():
        return [value for value in module(*inputs) if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", ["llama", "vit", "dit", "shared", "tied"])
@pytest.mark.parametrize("scheme", ["w4a6,skip=none", WEIGHT_ONLY], ids=["w4a6", "w4"])
def test_without_quantization_the_outputs_stay(name: str, scheme: str, captured) -> None:
    program = program_for(captured(name), scheme)
    _, args, kwargs = cases()[name].make()
    inputs = leaves_of(captured(name), (args, kwargs))
    before = unquantized(program, inputs)
    (result,) = run_passes(program, "rotate{block=64 weights_too=true}")
    assert sum(n for key, n in result.statistics.items() if "rotated in blocks" in key) > 0
    assert count(program, "fpq.hadamard") > 0
    for value, wanted in zip(unquantized(program, inputs), before, strict=True):
        if not wanted.is_floating_point():
            continue
        assert torch.allclose(value, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()))


def test_layers_of_one_input_share_one_transform() -> None:
    model = tiny(Attention)
    program = quantized(model, normal(1, 4, 32))
    (result,) = run_passes(program, "rotate")
    assert result.statistics == {"groups of layers rotated in blocks of 32": 2}
    first, _ = program.operations("fpq.hadamard")
    (quantize,) = {use.owner.name for use in first.results[0].uses}
    assert quantize == "fpq.quantize"
    for name in ("q", "k", "v", "out"):
        rotated = program.weights[f"{name}.weight.rotated"]
        assert torch.equal(rotated, hadamard(model.get_submodule(name).weight, 32))
    # The float weights are not read any more, and go.
    run_passes(program, "quantize-weights,lower-gemm,canonicalize,symbol-dce")
    assert not {"q.weight", "q.weight.rotated"} & set(program.weights)
    assert "q.weight.codes" in program.weights


@pytest.mark.parametrize(
    ("width", "block", "counted"),
    [
        (64, 128, "groups of layers rotated in blocks of 64"),
        (48, 32, "groups of layers rotated in blocks of 16"),
        (96, 16, "groups of layers rotated in blocks of 16"),
        (40, 128, "groups of layers not rotated"),
    ],
)
def test_the_largest_block_that_fits_is_taken(width: int, block: int, counted: str) -> None:
    program = quantized(nn.Linear(width, 8), normal(2, width))
    (result,) = run_passes(program, f"rotate{{block={block}}}")
    assert result.statistics == {counted: 1}
    assert count(program, "fpq.hadamard") == ("not" not in counted)


def test_inputs_that_are_not_quantized_are_rotated_if_asked() -> None:
    x = normal(3, 32)
    for option, rotated in (("", 0), ("{weights_too=true}", 2)):
        program = quantized(tiny(Mlp), x, scheme="w=f4E2M1FN@row:f32,a=none")
        (result,) = run_passes(program, f"rotate{option}")
        assert count(program, "fpq.hadamard") == rotated
        assert result.statistics.get("groups of layers not rotated", 0) == 2 - rotated


def test_a_weight_of_layers_with_different_inputs_is_left(captured) -> None:
    program = program_for(captured("shared"))
    (result,) = run_passes(program, "rotate")
    assert result.statistics["groups of layers rotated in blocks of 64"] == 1  # between
    assert result.statistics["groups of layers not rotated"] == 8


def test_stored_weights_are_not_rotated() -> None:
    program = quantized(tiny(Mlp), normal(3, 32))
    run_passes(program, "quantize-weights")
    with pytest.raises(PassError, match="all weights are rounded already"):
        run_passes(program, "rotate")


def test_other_blocks_are_refused() -> None:
    with pytest.raises(PassError, match="rotate: block must be one of 16, 32, 64, 128, not 24"):
        parse_pipeline("rotate{block=24}")


def test_a_rotated_model_saves_loads_and_runs(tmp_path: Path) -> None:
    model, x = tiny(Attention), normal(2, 4, 32)
    compiled = fpcompiler.compile(model, "w4a6,skip=none", example_inputs=x, method="rotate")
    compiled.save(tmp_path / "model.fpc")
    loaded = fpcompiler.load(tmp_path / "model.fpc")
    assert loaded.verify().ok
    for rows in (2, 1, 5):
        x = normal(rows, 7, 32, seed=rows)
        wanted = model(x).detach()
        assert torch.equal(loaded(x), compiled(x))
        assert 0 < float((compiled(x) - wanted).norm()) < 0.25 * float(wanted.norm())
