"""fuse-epilogue: which activations layers compute, which are left, and results that stay equal."""

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
from fpcompiler.runtime.fused import ACTIVATIONS
from tests.hf_models import hf_model
from tests.models import normal, token_ids
from tests.programs import Function, evaluate, import_named, program_of, run_passes

C = 32
USED = "left: the output has other uses"
SCHEME = "w4a6,skip=kept*"
BEFORE = (
    f'cse,normalize,fold-constants,insert-quantize{{scheme="{SCHEME}"}},cse,quantize-weights,'
    "lower-gemm,canonicalize,fuse-quantize"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = default_pipeline("w4a6")

Forward = Callable[[nn.Module, Tensor], Tensor]


def up(m: nn.Module, x: Tensor) -> Tensor:
    return functional.linear(x, m.up, m.bias)


def out(m: nn.Module, x: Tensor) -> Tensor:
    return functional.linear(x, m.out)


def kept(m: nn.Module, x: Tensor) -> Tensor:
    return functional.linear(x, m.kept)


FUSED: dict[str, tuple[str, Forward]] = {
    "silu": ("silu", lambda m, x: functional.silu(up(m, x))),
    "gelu": ("gelu", lambda m, x: functional.gelu(up(m, x))),
    "gelu-tanh": ("gelu_tanh", lambda m, x: functional.gelu(up(m, x), approximate="tanh")),
    "relu": ("relu", lambda m, x: functional.relu(up(m, x))),
    "in-place": ("relu", lambda m, x: functional.relu(up(m, x), inplace=True)),
    "several-read-the-result": (
        "silu", lambda m, x: (h := functional.silu(up(m, x))) + out(m, h)
    ),
    "read-by-a-kept-layer": ("gelu", lambda m, x: kept(m, functional.gelu(up(m, x)))),
    "gated": ("silu", lambda m, x: functional.silu(up(m, x)) * out(m, x)),
}  # fmt: skip

LEFT: dict[str, tuple[set[str], Forward]] = {
    "output-is-read-too": ({USED}, lambda m, x: functional.silu(h := up(m, x)) + h),
    "two-activations": ({USED}, lambda m, x: functional.silu(h := up(m, x)) + functional.relu(h)),
    "quantized": (set(), lambda m, x: out(m, functional.silu(up(m, x)))),
    "of-a-sum": (set(), lambda m, x: functional.silu(up(m, x) + x)),
    "of-a-view": (set(), lambda m, x: functional.silu(up(m, x).transpose(1, 2))),
    "of-a-kept-layer": (set(), lambda m, x: functional.silu(kept(m, x)) + up(m, x)),
    "other-function": (set(), lambda m, x: functional.leaky_relu(up(m, x))),
    "other-type": (set(), lambda m, x: functional.silu(up(m, x).double())),
    "norm": (set(), lambda m, x: functional.layer_norm(up(m, x), (C,))),
}


def model(forward: Forward, dtype: torch.dtype = torch.float32) -> nn.Module:
    weights = {"up": normal(C, C, seed=1), "out": normal(C, C, seed=2), "bias": normal(C, seed=3)}
    weights["kept"] = normal(C, C, seed=4)
    return Function(forward, **{name: value.to(dtype) for name, value in weights.items()})


def lowered(forward: Forward, x: Tensor) -> ir.Program:
    program = program_of(model(forward, x.dtype), x, dynamic=None)
    run_passes(program, BEFORE)
    return program


def without_fusing(pipeline: Pipeline) -> Pipeline:
    """Return it without the passes that give layers more to compute."""
    return tuple(item for item in pipeline if item.name not in ("fuse-epilogue", "fuse-residual"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "forward"), FUSED.values(), ids=FUSED)
def test_a_layer_computes_its_activation_with_the_same_result(name, forward, dtype) -> None:
    x = normal(2, 4, C, seed=5).to(dtype)
    program = lowered(forward, x)
    expected = evaluate(program, x)
    result, clean = run_passes(program, "fuse-epilogue,canonicalize")
    assert result.statistics == {f"{name} fused": 1}
    assert not clean.statistics, "what nothing reads any more was left"
    layers = program.operations("fpq.scaled_gemm")
    assert [activation_of(op) for op in layers if activation_of(op)] == [name]
    assert not program.operations(*(f"torch.aten.{name}" for name in ("silu", "gelu", "relu")))
    assert all(map(torch.equal, evaluate(program, x), expected))
    again = ir.parse_program(ir.print_program(program), program.weights)
    assert ir.print_program(again) == ir.print_program(program)
    assert all(map(torch.equal, evaluate(again, x), expected))
    assert not run_passes(program, "fuse-epilogue")[0].statistics


@pytest.mark.parametrize(("reasons", "forward"), LEFT.values(), ids=LEFT)
def test_near_misses_are_left_as_they_are(reasons: set[str], forward: Forward) -> None:
    program = lowered(forward, normal(2, C, C, seed=5))
    before = ir.print_program(program)
    (result,) = run_passes(program, "fuse-epilogue")
    assert set(result.statistics) == reasons
    assert ir.print_program(program) == before


def test_a_layer_has_one_activation() -> None:
    x = normal(2, 4, C, seed=5)
    program = lowered(lambda m, x: functional.gelu(functional.silu(up(m, x))), x)
    expected = evaluate(program, x)
    (result,) = run_passes(program, "fuse-epilogue")
    assert result.statistics == {"silu fused": 1}
    assert len(program.operations("torch.aten.gelu")) == 1
    (again,) = run_passes(program, "fuse-epilogue")
    assert not again.statistics
    assert all(map(torch.equal, evaluate(program, x), expected))


def test_the_pass_wants_chosen_kernels() -> None:
    program = program_of(model(FUSED["silu"][1]), normal(2, 4, C))
    with pytest.raises(PassError, match="fuse-epilogue needs a program at stage lowered"):
        run_passes(program, "normalize,fuse-epilogue")


@pytest.mark.parametrize(
    ("name", "scheme", "dtype", "fused"),
    [
        ("hf-llama", "w4a16", torch.bfloat16, {"silu": 2}),
        ("hf-llama", "w4a6", torch.bfloat16, {}),  # fuse-quantize takes them
        ("hf-gemma", "w4a16", torch.float32, {"gelu_tanh": 2}),
        ("hf-opt", "w4a16", torch.float16, {"relu": 2}),
        ("hf-bert", "w4a16", torch.float32, {"gelu": 2}),
    ],
)
def test_models_of_hugging_face(name, scheme, dtype, fused) -> None:
    ids = token_ids(2, 12)
    source = capture(hf_model(name).to(dtype), (ids,), {}, dynamic=None)
    results = []
    for pipeline in (without_fusing(default_pipeline(scheme)), default_pipeline(scheme)):
        program = import_named(source)
        *_, epilogue, _, _ = run_pipeline(program, pipeline)
        plan, weights = emit_plan(program, source.signature, source.placeholders, source.symbols)
        results.append(Executor(plan, weights).run_leaves([ids]))
    assert epilogue.statistics == {f"{kind} fused": number for kind, number in fused.items()}
    assert all(map(torch.equal, *results))


class Mixed(nn.Module):
    """Activations that go to a difference, to a head in high precision, and to a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(C, C), nn.Linear(C, C)
        self.down, self.lm_head = nn.Linear(C, C), nn.Linear(C, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x - functional.silu(self.gate(x))
        result: Tensor = self.lm_head(functional.gelu(self.down(functional.relu(self.up(x)))))
        return result


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def test_the_plan_says_what_a_layer_computes(mixed) -> None:
    compiled = fpcompiler.compile(mixed, "w4a6", example_inputs=normal(4, C), target="reference")
    reasons = {row.name: row.reason for row in compiled.plan().rows}
    assert reasons["gate"].endswith("; computes silu of its output")
    assert reasons["down"].endswith("; computes gelu of its output")
    assert "computes" not in reasons["up"]
    linear = {s.layer: s.args for s in compiled.artifact.plan.steps if s.op == "fpc.linear"}
    assert linear["gate"][8:] == ("silu",)
    assert linear["down"][8:] == ("gelu",)
    assert len(linear["up"]) == 8, "plans of layers without one stay what they were"


def test_layers_are_compared_behind_their_activation(mixed) -> None:
    x = normal(4, C, seed=7)
    fused, plain = (
        fpcompiler.compile(mixed, example_inputs=x, pipeline=items)
        for items in (FULL, without_fusing(FULL))
    )
    assert torch.equal(fused(x), plain(x))
    recorded: dict[str, Tensor] = {}
    for name in ("gate", "down"):
        module = getattr(mixed, name)
        module.register_forward_hook(lambda m, a, y, name=name: recorded.update({name: y}))
    mixed(x)
    rows = {row.name: row for row in fused.compare(mixed, [x]).rows}
    others = {row.name: row for row in plain.compare(mixed, [x]).rows}
    assert all(rows[name] == others[name] for name in ("up", "lm_head", "output"))
    for name, function in (("gate", functional.silu), ("down", functional.gelu)):
        # The same distance as that of what the two programs compute of it, in other words.
        found, before = rows[name], others[name]
        assert found.reason == ""
        assert found.calls == 1
        assert found.max_error is not None
        assert before.max_error is not None
        assert found.max_error <= 1.13 * before.max_error  # slopes of SiLU and GELU are below it
        assert found.max_error < float(function(recorded[name]).abs().max()) / 4


def test_the_numbers_of_a_pass_compare_layers_behind_their_activation(mixed) -> None:
    x = normal(4, C, seed=7)
    program = program_of(mixed, x)
    probe = Probe(program, [x])
    run_pipeline(program, without_fusing(FULL)[:-1])
    probe.measure(program, "before")
    run_passes(program, "fuse-epilogue")
    probe.measure(program, "after")
    before, after = probe.rows
    assert after["outputs_sqnr_db"] == before["outputs_sqnr_db"]
    layers, changed = after["layers_sqnr_db"], before["layers_sqnr_db"]
    assert set(layers) == set(changed) == {"gate", "up", "down", "lm_head"}
    assert {name for name in layers if layers[name] != changed[name]} == {"gate", "down"}
    assert all(10 < db < 40 for db in layers.values())


def test_every_activation_can_be_fused() -> None:
    assert {name for name, _ in FUSED.values()} == set(ACTIVATIONS)
