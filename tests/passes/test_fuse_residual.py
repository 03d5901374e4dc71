"""fuse-residual: which sums layers compute, which are left, and results that stay equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler import ir
from fpcompiler.capture import capture
from fpcompiler.codegen.emit_plan import emit_plan
from fpcompiler.errors import PassError
from fpcompiler.ir.linear import activation_of
from fpcompiler.passes import Pipeline, Probe, default_pipeline, run_pipeline
from fpcompiler.runtime.executor import Executor
from tests.hf_models import hf_model
from tests.models import normal, token_ids
from tests.passes.test_fuse_epilogue import BEFORE, C, kept, model, out, up
from tests.programs import evaluate, import_named, program_of, run_passes

USED = "left: the output has other uses"
DONE = "residuals fused"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = default_pipeline("w4a6")

Forward = Callable[[nn.Module, Tensor], Tensor]

FUSED: dict[str, tuple[int, Forward]] = {
    "residual-first": (1, lambda m, x: x + up(m, x)),
    "output-first": (1, lambda m, x: up(m, x) + x),
    "in-place": (1, lambda m, x: up(m, x).add_(x)),
    "of-an-activation": (1, lambda m, x: x + functional.silu(up(m, x))),
    "computed-after-the-layer": (1, lambda m, x: up(m, x) + torch.tanh(x)),
    "of-a-view": (1, lambda m, x: out(m, x) + x.transpose(0, 1).contiguous().transpose(0, 1)),
    "sum-of-two-layers": (1, lambda m, x: up(m, x) + out(m, x)),
    "one-after-the-other": (2, lambda m, x: (h := x + up(m, x)) + out(m, h)),
    "of-a-layer-and-two-terms": (1, lambda m, x: (x + torch.tanh(x)) + up(m, x)),
    "of-the-other-layer-s-input": (1, lambda m, x: up(m, h := kept(m, x)) + h),
    "the-other-output-is-read-too": (1, lambda m, x: (up(m, x) + (h := out(m, x))) * h),
}

LEFT: dict[str, tuple[set[str], Forward]] = {
    "output-is-read-too": ({USED}, lambda m, x: (h := up(m, x)) * (x + h)),
    "twice-the-output": ({USED}, lambda m, x: (h := up(m, x)) + h),
    "with-a-factor": (set(), lambda m, x: torch.add(x, up(m, x), alpha=2)),
    "with-a-number": (set(), lambda m, x: up(m, x) + 2),
    "difference": (set(), lambda m, x: x - up(m, x)),
    "broadcast": (set(), lambda m, x: up(m, x) + x[:, :1]),
    "of-fewer-axes": (set(), lambda m, x: up(m, x) + x[0]),
    "into-more-axes": (set(), lambda m, x: up(m, x) + x[None]),
    "of-a-wider-type": (set(), lambda m, x: up(m, x) + x.double()),
    "of-a-view-of-the-output": (set(), lambda m, x: up(m, x).transpose(0, 1) + x),
    "of-a-kept-layer": (set(), lambda m, x: kept(m, x) + x * out(m, x)),
    "of-a-norm": (set(), lambda m, x: functional.layer_norm(up(m, x), (C,)) + x),
}


def lowered(forward: Forward, x: Tensor) -> ir.Program:
    program = program_of(model(forward, x.dtype), x, dynamic=None)
    run_passes(program, f"{BEFORE},fuse-epilogue")
    return program


def without_fusing(pipeline: Pipeline) -> Pipeline:
    return tuple(item for item in pipeline if item.name != "fuse-residual")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("number", "forward"), FUSED.values(), ids=FUSED)
def test_a_layer_adds_its_residual_with_the_same_result(number, forward, dtype) -> None:
    x = normal(4, 4, C, seed=5).to(dtype)
    program = lowered(forward, x)
    expected = evaluate(program, x)
    sums = len(program.operations("torch.aten.add.Tensor"))
    result, clean = run_passes(program, "fuse-residual,canonicalize")
    assert result.statistics == {DONE: number}
    assert not clean.statistics, "what nothing reads any more was left"
    assert len(program.operations("fpq.scaled_gemm_add")) == number
    assert len(program.operations("torch.aten.add.Tensor")) == sums - number
    assert all(map(torch.equal, evaluate(program, x), expected))
    again = ir.parse_program(ir.print_program(program), program.weights)
    assert ir.print_program(again) == ir.print_program(program)
    assert all(map(torch.equal, evaluate(again, x), expected))
    assert not run_passes(program, "fuse-residual")[0].statistics


@pytest.mark.parametrize(("reasons", "forward"), LEFT.values(), ids=LEFT)
def test_near_misses_are_left_as_they_are(reasons: set[str], forward: Forward) -> None:
    program = lowered(forward, normal(C, C, C, seed=5))
    before = ir.print_program(program)
    (result,) = run_passes(program, "fuse-residual")
    assert set(result.statistics) == reasons
    assert ir.print_program(program) == before


def test_integers_are_no_residual() -> None:
    program = lowered(lambda m, x: up(m, x) + x.long(), normal(2, C, seed=5))
    assert not run_passes(program, "fuse-residual")[0].statistics


def test_the_later_of_two_layers_adds_the_other() -> None:
    x = normal(2, 4, C, seed=5)
    program = lowered(lambda m, x: out(m, x) + up(m, x), x)
    run_passes(program, "fuse-residual")
    (first,) = program.operations("fpq.scaled_gemm")
    (second,) = program.operations("fpq.scaled_gemm_add")
    assert second.operands[3] == first.results[0]


def test_a_layer_computes_its_activation_before() -> None:
    program = lowered(FUSED["of-an-activation"][1], normal(2, 4, C))
    run_passes(program, "fuse-residual")
    (layer,) = program.operations("fpq.scaled_gemm_add")
    assert activation_of(layer) == "silu"
    assert layer.operands[3] == program.body.arguments[0]


def test_activations_of_the_sum_stay_behind_it() -> None:
    x = normal(2, 4, C, seed=5)
    program = lowered(lambda m, x: functional.silu(x + up(m, x)), x)
    expected = evaluate(program, x)
    residual, epilogue = run_passes(program, "fuse-residual,fuse-epilogue")
    assert (residual.statistics, epilogue.statistics) == ({DONE: 1}, {})
    assert all(map(torch.equal, evaluate(program, x), expected))


def test_sizes_that_vary_are_compared_axis_by_axis() -> None:
    forward = FUSED["residual-first"][1]
    program = program_of(model(forward), normal(2, 4, C), dynamic="auto")
    run_passes(program, f"{BEFORE},fuse-epilogue")
    (result,) = run_passes(program, "fuse-residual")
    assert result.statistics == {DONE: 1}
    x = normal(3, 7, C)
    plain = program_of(model(forward), normal(2, 4, C), dynamic="auto")
    run_passes(plain, BEFORE)
    assert all(map(torch.equal, evaluate(program, x), evaluate(plain, x)))


def test_the_pass_wants_chosen_kernels() -> None:
    program = program_of(model(FUSED["in-place"][1]), normal(2, 4, C))
    with pytest.raises(PassError, match="fuse-residual needs a program at stage lowered"):
        run_passes(program, "normalize,fuse-residual")


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("name", "scheme", "dtype", "fused"),
    [
        ("hf-llama", "w4a6", torch.bfloat16, 4),
        ("hf-gemma", "w4a16", torch.float32, 4),
        ("hf-opt", "w4a16", torch.float16, 4),
        ("hf-bert", "w4a6", torch.float32, 4),
    ],
)
def test_models_of_hugging_face(name, scheme, dtype, fused, target) -> None:
    ids = token_ids(2, 12)
    source = capture(hf_model(name).to(dtype), (ids,), {}, dynamic=None)
    full = default_pipeline(scheme, target)
    results = []
    for pipeline in (without_fusing(full), full):
        program = import_named(source)
        *_, residuals, _ = run_pipeline(program, pipeline)
        plan, weights = emit_plan(program, source.signature, source.placeholders, source.symbols)
        executor = Executor(plan, weights)
        results.append([executor.run_leaves([ids]) for _ in range(4)])
    assert residuals.statistics == {DONE: fused}
    for plain, found in zip(*results, strict=True):
        assert all(map(torch.equal, plain, found))


class Mixed(nn.Module):
    """Residuals of a layer, of an activation of one, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(C, C), nn.Linear(C, C)
        self.down, self.lm_head = nn.Linear(C, C), nn.Linear(C, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.silu(self.gate(x))
        result: Tensor = self.lm_head(x + self.down(functional.relu(self.up(x))))
        return result


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def test_the_plan_says_what_a_layer_adds(mixed) -> None:
    compiled = fpcompiler.compile(mixed, "w4a6", example_inputs=normal(4, C), target="reference")
    reasons = {row.name: row.reason for row in compiled.plan().rows}
    assert reasons["gate"].endswith("; computes silu of its output; adds a residual to its output")
    assert reasons["down"].endswith("; adds a residual to its output")
    assert "adds" not in reasons["up"]
    linear = {s.layer: s for s in compiled.artifact.plan.steps if s.op == "fpc.linear"}
    assert linear["gate"].args[8:] == ("silu", {"v": "x"})
    assert linear["down"].args[8:] == ("", {"v": linear["gate"].outs[0]})
    assert len(linear["up"].args) == 8, "plans of layers without one stay what they were"


def test_layers_are_compared_before_their_residual(mixed) -> None:
    x = normal(4, C, seed=7)
    fused, plain = (
        fpcompiler.compile(mixed, example_inputs=x, pipeline=items)
        for items in (FULL, without_fusing(FULL))
    )
    assert torch.equal(fused(x), plain(x))
    rows, others = fused.compare(mixed, [x]).rows, plain.compare(mixed, [x]).rows
    assert rows == others
    assert {row.name for row in rows} == {"gate", "up", "down", "lm_head", "output"}


def test_the_numbers_of_a_pass_compare_layers_before_their_residual(mixed) -> None:
    x = normal(4, C, seed=7)
    program = program_of(mixed, x)
    probe = Probe(program, [x])
    run_pipeline(program, without_fusing(FULL)[:-1])
    probe.measure(program, "before")
    run_passes(program, "fuse-residual")
    probe.measure(program, "after")
    before, after = probe.rows
    assert {**after, "after": "before"} == before
    assert set(after["layers_sqnr_db"]) == {"gate", "up", "down", "lm_head"}
