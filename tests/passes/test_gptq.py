"""The gptq pass: never worse than rounding to nearest, with its own scales or those of a search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import ir, numerics, passes
from fpcompiler.calibration import Calibration, input_groups
from fpcompiler.errors import NumericsError, PassError
from fpcompiler.ir.types import quantized_type
from fpcompiler.numerics.gptq import output_error
from tests.calibration.runs import CPU, visit
from tests.models import Llama, SharedBlock, TiedLanguageModel, normal, token_ids
from tests.programs import count, quantized, run_passes

SCHEMES = ("w4a6,skip=none", "w=f4E2M1FN@row:f32,a=none,skip=none", "nvfp4,skip=none")


def seeded(kind: type[nn.Module], *args) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args).eval()


def calibrated(program: ir.Program, pipeline: str, calibration: Calibration):
    items = passes.parse_pipeline(pipeline)
    return passes.run_pipeline(program, items, calibration=calibration)


def tokens(rows: int = 16) -> Calibration:
    """Return 576 tokens by default, which are enough for the 128 inputs of the widest layer."""
    return Calibration([(token_ids(rows, 12, seed=i),) for i in range(3)], device=CPU)


def stored(program: ir.Program) -> dict[str, Tensor]:
    """Return the values of the stored weight of each layer, in program order."""
    found = {}
    for op in program.operations("fpq.linear"):
        layer = str(op.attributes["layer"]).strip('"')
        assemble = op.operands[1].owner
        assert assemble.name == "fpq.assemble"
        names = [ir.build.global_of(value) for value in assemble.operands]
        codes, *scales = [program.weights[name] for name in names if name]
        kind = quantized_type(op.operands[1])
        found[layer] = numerics.dequantize_packed(
            codes, tuple(scales), kind.operand, kind.shape[-1]
        )
    return found


def grams(program: ir.Program, calibration: Calibration) -> dict[str, Tensor]:
    """Return the Hessian of each layer, from the program before its weights are rounded."""
    results = visit(program, calibration)
    with program.context():
        groups = input_groups(program)
        return {name: results[g.name]["gram"] for g in groups for name in g.names}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("before", ["", "search-formats{formats=given}"], ids=["own", "searched"])
def test_no_layer_is_worse_than_rounding_to_nearest(scheme: str, before: str) -> None:
    model = seeded(Llama, 1)
    program = quantized(model, token_ids(2, 12), scheme=scheme)
    hessians = grams(program, tokens())
    if before:
        calibrated(program, before, tokens())
    other = program.clone()
    calibrated(program, "gptq,quantize-weights", tokens())
    calibrated(other, "quantize-weights", tokens())
    ours, nearest = stored(program), stored(other)
    assert len(ours) == 8
    total = [0.0, 0.0]
    for name, hessian in hessians.items():
        float_weight = model.get_submodule(name).weight
        errors = [output_error(float_weight, w[name], hessian) for w in (ours, nearest)]
        assert bool((errors[0] <= errors[1] * (1 + 1e-6) + 1e-12).all()), name
        total = [sum + float(error.sum()) for sum, error in zip(total, errors, strict=True)]
    assert total[0] < 0.9 * total[1]


def test_gptq_takes_the_scales_of_a_search() -> None:
    program = quantized(seeded(Llama, 1), token_ids(2, 12), scheme=SCHEMES[1])
    calibrated(program, "search-formats", tokens())
    scales = {key: value for key, value in program.weights.items() if "_scale" in key}
    assert len(scales) == 8
    calibrated(program, "gptq", tokens())
    kept = [t for key, t in program.weights.items() if "_scale" in key and key not in scales]
    assert len(kept) == 8
    assert all(any(torch.equal(t, s) for s in scales.values()) for t in kept)


def test_with_few_tokens_a_weight_that_gptq_does_not_help_is_rounded_to_nearest() -> None:
    # Random inputs take all directions: what 12 of them say does not hold for others.
    model = seeded(nn.Sequential, nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False))
    program = quantized(model, normal(2, 64), scheme=SCHEMES[1])
    nearest = program.clone()
    data = Calibration([(normal(4, 64, seed=i),) for i in range(3)], device=CPU)
    (result,) = calibrated(program, "gptq", data)
    counted = "weights rounded to nearest, since gptq does not help"
    assert 1 <= result.statistics[counted] <= 2
    few = "inputs with few tokens, where gptq was checked on tokens held out"
    assert result.statistics[few] == 2
    calibrated(nearest, "quantize-weights", data)
    ours, plain = stored(program), stored(nearest)
    notes = {
        str(op.attributes["layer"]).strip('"'): str(op.attributes["fpq.note"])
        for op in program.operations("fpq.linear")
    }
    for name, note in notes.items():
        kept = "rounded to nearest: gptq does not help (12 tokens for" in note
        assert kept or "weight rounded by gptq (12 tokens for" in note
        assert torch.equal(ours[name], plain[name]) == kept


def test_with_enough_tokens_nothing_is_checked() -> None:
    program = quantized(seeded(Llama, 1), token_ids(2, 12), scheme=SCHEMES[1])
    (result,) = calibrated(program, "gptq", tokens())
    assert not any("held out" in what or "not help" in what for what in result.statistics)


@pytest.mark.parametrize("kind", [SharedBlock, TiedLanguageModel])
def test_a_shared_weight_is_stored_once_and_rounded_to_nearest(kind: type[nn.Module]) -> None:
    x = normal(2, 6, 64) if kind is SharedBlock else token_ids(2, 12)
    program = quantized(seeded(kind), x)
    linears = count(program, "fpq.linear")
    weights = len({op.operands[1] for op in program.operations("fpq.linear")})
    assert weights == (5 if kind is SharedBlock else 8)
    assert linears == (9 if kind is SharedBlock else 8)
    first, second = calibrated(program, "gptq,quantize-weights", Calibration([(x,)], device=CPU))
    shared = 4 if kind is SharedBlock else 0
    assert first.statistics.get("weights left, since they multiply several inputs", 0) == shared
    assert first.statistics["weights quantized"] == weights - shared
    assert second.statistics.get("weights quantized", 0) == shared
    assert sum(key.endswith(".codes") for key in program.weights) == weights
    assert count(program, "fpq.assemble") == weights
    assert count(program, "fpq.linear") == linears


def test_a_model_compiled_with_gptq_saves_loads_and_repeats(tmp_path: Path) -> None:
    model, data = seeded(Llama, 1), [token_ids(2, 12, seed=i) for i in range(2)]
    files = []
    for name in ("a", "b"):
        compiled = fpcompiler.compile(
            model, "w4a6", calibration=data, method="gptq", dump_dir=tmp_path / name
        )
        compiled.save(tmp_path / f"{name}.fpc")
        files.append((tmp_path / f"{name}.fpc").read_bytes())
        assert len(list((tmp_path / name).glob("*-gptq.mlir"))) == 1
    assert files[0] == files[1]
    loaded = fpcompiler.load(tmp_path / "a.fpc")
    assert loaded.verify().ok
    for ids in (token_ids(2, 12), token_ids(1, 3, seed=5)):
        assert torch.equal(loaded(ids), compiled(ids))
    nearest = fpcompiler.compile(model, "w4a6", example_inputs=data[0])
    wanted = model(data[0]).detach()
    errors = [float((m(data[0]) - wanted).norm()) for m in (compiled, nearest)]
    assert errors[0] < errors[1]


def test_without_calibration_the_error_says_what_to_pass() -> None:
    program = quantized(seeded(Llama, 1), token_ids(2, 12))
    for name in ("gptq", "search-formats"):
        with pytest.raises(PassError) as caught:
            run_passes(program, name)
        assert str(caught.value) == (
            f"{name} needs calibration data: compile(..., calibration=batches), where each batch "
            "is a tensor, a tuple of arguments or a dict of keyword arguments."
        )


def test_a_weight_that_is_no_number_names_its_layer() -> None:
    model = seeded(Llama, 1)
    model.lm_head.weight.data[1, 2] = float("nan")
    calibration = Calibration([(token_ids(2, 12),)], device=CPU)
    program = quantized(model, token_ids(2, 12), scheme="w=f4E2M1FN@row:f32,a=none,skip=none")
    with pytest.raises(NumericsError, match=r"^layer 'lm_head': input holds NaN/Inf"):
        calibrated(program, "gptq", calibration)
    model.layers[0].v_proj.weight.data[1, 2] = float("nan")
    program = quantized(model, token_ids(2, 12))
    with pytest.raises(NumericsError, match=r"^layer 'layers\.0\.o_proj': its input holds NaN/Inf"):
        calibrated(program, "gptq", calibration)
