"""The search-formats pass: what it chooses is in the program, runs, and is no worse than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import ir, numerics, passes, target
from fpcompiler.calibration import Calibration, input_groups
from fpcompiler.errors import PassError
from fpcompiler.ir.types import quantized_type
from fpcompiler.operand import Operand
from fpcompiler.target import GemmKind, Status, Target
from tests.calibration.runs import CPU, batches_for, hooked, program_for
from tests.models import cases, normal
from tests.passes.test_gptq import calibrated
from tests.passes.tiny import Attention, Mlp, tiny
from tests.programs import count, evaluate, quantized

STATIC = "w=f4E2M1FN@row:f32,a=f6E2M3FN@tensor:f32,skip=none"
TOKEN = "w=f4E2M1FN@row:f32,a=f6E2M3FN@token:f32,skip=none"
WEIGHTS = "w=f4E2M1FN@row:f32,a=none,skip=none"
SCHEMES = (STATIC, TOKEN, WEIGHTS, "w4a6,skip=none", "nvfp4,skip=none")


def operands(program: ir.Program) -> dict[str, tuple[Operand | None, Operand]]:
    """Return the operands of the input and of the weight of each layer."""
    found = {}
    for op in program.operations("fpq.linear"):
        x = quantized_type(op.operands[0])
        name = str(op.attributes["layer"]).strip('"')
        found[name] = (x and x.operand, quantized_type(op.operands[1]).operand)
    return found


def layer_errors(model: nn.Module, scheme: str, pipeline: str, x: Tensor) -> dict[str, float]:
    """Return the squared error of each layer on its own: its input comes from the float model."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    rows = {key: torch.cat(value) for key, value in hooked(model, names, [((x,), {})]).items()}
    program = quantized(model, x, scheme=scheme)
    if pipeline:
        calibrated(program, pipeline, Calibration([(x,)], device=CPU))
    errors = {}
    for op in program.operations("fpq.linear"):
        name = str(op.attributes["layer"]).strip('"')
        weight = model.get_submodule(name).weight.detach()
        values = [
            as_quantized(program, op.operands[0], rows[name]),
            as_quantized(program, op.operands[1], weight),
        ]
        error = values[0].double() @ values[1].double().T - rows[name].double() @ weight.double().T
        errors[name] = float(error.square().sum())
    return errors


def as_quantized(program: ir.Program, value, tensor: Tensor) -> Tensor:
    """Return what a tensor becomes where the program quantizes it to a value."""
    kind = quantized_type(value)
    if kind is None:
        return tensor
    if value.owner.name == "fpq.quantize":
        return numerics.dequantize(*numerics.quantize(tensor, kind.operand), kind.operand)
    assert value.owner.name == "fpq.encode"
    names = [ir.build.global_of(scale) for scale in list(value.owner.operands)[1:]]
    scales = tuple(program.weights[name] for name in names if name)
    if all(scale.numel() == 1 for scale in scales):
        scales = tuple(scale.view(1, 1) for scale in scales)
    codes = numerics.quantize_with(tensor, scales, kind.operand)
    return numerics.dequantize(codes, scales, kind.operand)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("formats", ["same-bits", "given"])
def test_no_group_of_layers_is_worse_than_rounding_to_nearest(scheme: str, formats: str) -> None:
    model, x = tiny(Attention), normal(4, 9, 32) ** 3
    ours = layer_errors(model, scheme, f"search-formats{{formats={formats}}}", x)
    nearest = layer_errors(model, scheme, "", x)
    assert len(ours) == 4
    for group in (("q", "k", "v"), ("out",)):
        error, limit = (sum(table[name] for name in group) for table in (ours, nearest))
        assert error <= limit * (1 + 1e-5), group
    if scheme == WEIGHTS:  # nothing is shared, so it holds for each layer
        assert all(ours[name] <= nearest[name] * (1 + 1e-5) for name in ours)
    if scheme in (STATIC, TOKEN, WEIGHTS):  # blocks are as long as a row here: little to choose
        assert sum(ours.values()) < sum(nearest.values())


def test_formats_given_are_kept_and_same_bits_are_as_wide() -> None:
    x = normal(4, 9, 32) ** 3
    calibration = Calibration([(x,)], device=CPU)
    chosen = {}
    for formats in ("given", "same-bits"):
        program = quantized(tiny(Attention), x, scheme=STATIC)
        before = operands(program)
        calibrated(program, f"search-formats{{formats={formats}}}", calibration)
        chosen[formats] = operands(program)
        for name, (a, w) in chosen[formats].items():
            assert a.format.storage_bits == 6
            assert w.format.storage_bits == 4
            assert (a.levels, w.levels) == tuple(o.levels for o in before[name])
    assert chosen["given"] == before
    assert chosen["same-bits"] != before


MIXED = f"{STATIC}; v: w=f8E4M3FN@row:f32,a=f6E2M3FN@tensor:f32"


@pytest.mark.parametrize("formats", ["same-bits", "given"])
def test_layers_of_one_input_keep_weights_of_their_own_width(formats: str) -> None:
    x = normal(4, 9, 32)
    program = quantized(tiny(Attention), x, scheme=MIXED)
    calibrated(program, f"search-formats{{formats={formats}}}", Calibration([(x,)], device=CPU))
    bits = {name: w.format.storage_bits for name, (_, w) in operands(program).items()}
    assert bits == {"q": 4, "k": 4, "v": 8, "out": 4}
    evaluate(program, x)


def test_a_static_scale_is_in_the_program_and_saturates(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32, bias=False)), normal(16, 32)
    torch.nn.init.eye_(model[0].weight)
    compiled = fpcompiler.compile(model, STATIC, calibration=[x], method="search")
    program = quantized(model, x, scheme=STATIC)
    (result,) = calibrated(program, "search-formats", Calibration([(x,)], device=CPU))
    assert result.statistics["groups of layers searched"] == 1
    encode = program.operations("fpq.linear")[0].operands[0].owner
    stored = program.weights["0.input.outer_scale"]
    assert ir.build.global_of(encode.operands[1]) == "0.input.outer_scale"
    assert stored.shape == (1, 1)
    operand = quantized_type(encode.results[0]).operand
    largest = float(stored) * operand.format.max
    assert largest < 1.1 * float(x.abs().max())
    big = torch.full((2, 32), 50.0)
    (y,) = evaluate(program, big)
    assert torch.allclose(y, torch.full_like(y, largest), rtol=0.2)
    assert torch.equal(compiled(big), y)
    # The scale is not that of the batch: a small row gives the same, whatever is next to it.
    small = torch.cat([x[:1], 50 * x[1:2]])
    assert torch.equal(evaluate(program, small)[0][:1], evaluate(program, x[:1])[0])
    compiled.save(tmp_path / "model.fpc")
    loaded = fpcompiler.load(tmp_path / "model.fpc")
    assert loaded.verify().ok
    assert torch.equal(loaded(small), compiled(small))


def test_the_published_search_runs() -> None:
    x = normal(4, 9, 32)
    program = quantized(tiny(Attention), x, scheme=STATIC)
    (result,) = calibrated(
        program, "search-formats{mode=faithful}", Calibration([(x,)], device=CPU)
    )
    assert result.statistics["groups of layers searched"] == 2
    assert count(program, "fpq.encode") == 6
    (y,) = evaluate(program, x)
    wanted = tiny(Attention)(x).detach()
    assert float((y - wanted).norm()) < 0.3 * float(wanted.norm())


def kinds(*pairs: tuple[Sequence[str], Sequence[str]]) -> tuple[GemmKind, ...]:
    blocks = ("",)
    return tuple(
        GemmKind(f"kind{i}", tuple(w), tuple(a), blocks, 1, "none", "none")
        for i, (w, a) in enumerate(pairs)
    )


W4 = ("f4E2M1FN", "f4E1M2FN", "f4E3M0FN")
A6 = ("f6E3M2FN", "f6E2M3FN")


@pytest.mark.parametrize(
    "pairs",
    [
        [(W4[:1], A6[:1])],
        [(W4[:1], A6)],
        [(W4[:2], A6[:1])],
        # Each format has a partner, but not all pairs run.
        [(W4[:1], A6), (W4, A6[:1])],
        [(W4[1:], A6[1:])],  # what is given does not run: it stays, and lower-gemm refuses it
    ],
)
def test_what_the_target_cannot_run_is_not_chosen(pairs, monkeypatch) -> None:
    row = Target("narrow", "none", Status.UNAVAILABLE, kinds(*pairs))
    table: Mapping[str, Target] = MappingProxyType({**target.TARGETS, "narrow": row})
    monkeypatch.setattr(target, "TARGETS", table)
    x = normal(6, 9, 32)
    for scheme in (STATIC, TOKEN):
        # Where all pairs run, E2M3 is chosen for the inputs and E1M2 for the weights.
        program = quantized(tiny(Attention), x, scheme=scheme.replace("f6E2M3FN", "f6E3M2FN"))
        given = operands(program)
        calibrated(program, "search-formats{target=narrow}", Calibration([(x,)], device=CPU))
        for name, (a, w) in operands(program).items():
            ran = row.kind_for(w, a) is not None
            assert ran or (a.format, w.format) == tuple(o.format for o in given[name])
            assert ran == (pairs[0][0][0] == W4[0])


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("vit", STATIC), ("shared", STATIC), ("shared", "w4a6,skip=none"), ("hf-gpt2", TOKEN)],
    ids=["vit", "shared-static", "shared-w4a6", "hf-gpt2"],
)
def test_convolutions_addmm_and_shared_layers(name: str, scheme: str, captured) -> None:
    _, args, kwargs = cases()[name].make()
    program = program_for(captured(name), scheme)
    (batch,) = batches_for(captured(name), [(args, kwargs)])
    exact = [v for v in evaluate(program, *batch) if isinstance(v, Tensor)]
    (result,) = calibrated(program, "search-formats", Calibration([batch], device=CPU, sample=64))
    assert result.statistics["groups of layers searched"] >= (1 if name == "shared" else 4)
    values = [v for v in evaluate(program, *batch) if isinstance(v, Tensor)]
    for value, other in zip(values, exact, strict=True):
        assert value.shape == other.shape
        assert bool(value.isfinite().all())
    done = calibrated(program, "gptq,quantize-weights", Calibration([batch], device=CPU, sample=64))
    stored = sum(item.statistics.get("weights quantized", 0) for item in done)
    assert stored == count(program, "fpq.assemble")


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(PassError, match="search-formats: mode must be one of default, faithful:"):
        passes.parse_pipeline("search-formats{mode=fast}")
    with pytest.raises(PassError, match="formats must be one of same-bits, given: 'all'"):
        passes.parse_pipeline("search-formats{formats=all}")
    with pytest.raises(PassError, match="inputs must be one of search, keep: 'none'"):
        passes.parse_pipeline("search-formats{inputs=none}")


def test_inputs_can_be_kept_for_a_pass_that_comes_after() -> None:
    program = quantized(tiny(Mlp), normal(8, 32), scheme=STATIC)
    inputs = [group.quantize for group in input_groups(program)]
    calibrated(program, "search-formats{inputs=keep}", Calibration([(normal(8, 32),)], device=CPU))
    assert [group.quantize for group in input_groups(program)] == inputs
    assert count(program, "fpq.encode") == 3  # the weights


def test_the_golden_dump_of_a_search_and_a_rotation(golden) -> None:
    program = quantized(tiny(Mlp), normal(8, 32), scheme="w=f4E2M1FN@row:f32,a=f6E2M3FN@tensor:f32")
    calibration = Calibration([(normal(8, 32),)], device=CPU)
    calibrated(program, "rotate,search-formats{formats=given}", calibration)
    golden("mlp-rotated-searched.mlir", ir.print_program(program, locations=False))


def test_the_search_helps_the_model() -> None:
    model, x = tiny(Attention), normal(16, 9, 32) ** 3
    wanted = model(x).detach()
    errors = {}
    for method in ("rtn", "search", "search-gptq"):
        compiled = fpcompiler.compile(model, STATIC, calibration=[x], method=method)
        errors[method] = float((compiled(x) - wanted).norm())
    assert errors["search-gptq"] < errors["search"] < errors["rtn"]
