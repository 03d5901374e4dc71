"""fuse-quantize: every pattern as models write it, the near misses, and results that stay equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from examples.dit.model import Config, DiT
from fpcompiler import ir
from fpcompiler.capture import capture
from fpcompiler.codegen.emit_plan import emit_plan
from fpcompiler.errors import PassError
from fpcompiler.passes import Pipeline, default_pipeline, run_pipeline
from fpcompiler.runtime.executor import Executor
from tests.hf_models import hf_model
from tests.models import normal, token_ids
from tests.passes.tiny import Attention, tiny
from tests.programs import Function, count, evaluate, import_named, program_of, run_passes

C = 32
OTHER = "left: neither a norm nor an activation"
USED = "left: the value has other uses"
BEFORE = (
    'cse,normalize,fold-constants,insert-quantize{scheme="w4a6,skip=none"},cse,quantize-weights,'
    "lower-gemm,canonicalize"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FULL = default_pipeline("w4a6")

Forward = Callable[[nn.Module, Tensor], Tensor]


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def without_fusing(pipeline: Pipeline) -> Pipeline:
    return tuple(item for item in pipeline if not item.name.startswith("fuse-"))


def out(m: nn.Module, h: Tensor) -> Tensor:
    """The layer whose input is quantized."""
    return functional.linear(h, m.out)


def modulated(m: nn.Module, x: Tensor) -> Tensor:
    """adaLN with a condition ``[B, C]``, unsqueezed."""
    shift, scale = functional.linear(x[:, 0], m.both).chunk(2, dim=-1)
    h = functional.layer_norm(x, (C,), eps=1e-6)
    return out(m, h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))


def modulated_in_other_order(m: nn.Module, x: Tensor) -> Tensor:
    shift, scale = functional.linear(x[:, :1], m.both).chunk(2, dim=-1)
    return out(m, shift + (scale + 1.0) * rms(x).to(x.dtype))


def norm_in_other_words(m: nn.Module, x: Tensor) -> Tensor:
    wide = x.float()
    h = x * torch.rsqrt((wide * wide).mean(2, keepdim=True) + 1e-6)  # as wide as the other factor
    return out(m, m.weight * h.to(x.dtype))


def gated(m: nn.Module, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = functional.linear(x, m.both).chunk(2, dim=-1)
    return out(m, activation(gate) * up)


FUSED: dict[str, tuple[str, Forward]] = {
    "llama": ("rms_norm", lambda m, x: out(m, m.weight * rms(x).to(x.dtype))),
    "llama-other-order": ("rms_norm", lambda m, x: out(m, rms(x).to(x.dtype) * m.weight)),
    "rms-no-weight": ("rms_norm", lambda m, x: out(m, rms(x).to(x.dtype))),
    "rms-in-other-words": ("rms_norm", norm_in_other_words),
    "gemma": ("rms_norm_wide", lambda m, x: out(m, (rms(x) * m.weight.float()).type_as(x))),
    "rms-of-torch": (
        "rms_norm_wide", lambda m, x: out(m, functional.rms_norm(x, (C,), m.weight))
    ),
    "layer-norm": (
        "layer_norm", lambda m, x: out(m, functional.layer_norm(x, (C,), m.weight, m.bias))
    ),
    "layer-norm-plain": ("layer_norm", lambda m, x: out(m, functional.layer_norm(x, (C,)))),
    "native-layer-norm": (
        "layer_norm",
        lambda m, x: out(m, torch.native_layer_norm(x, (C,), m.weight, m.bias, 1e-5)[0]),
    ),
    "modulate": ("layer_norm_modulate", modulated),
    "modulate-rms": ("rms_norm_modulate", modulated_in_other_order),
    "modulate-no-shift": (
        "layer_norm_modulate",
        lambda m, x: out(m, (1 + out(m, x[:, :1])) * functional.layer_norm(x, (C,))),
    ),
    "shifted": (
        "layer_norm_add",
        lambda m, x: out(m, functional.layer_norm(x, (C,)) + out(m, x[:, 0])[:, None]),
    ),
    "scaled": ("layer_norm_mul", lambda m, x: out(m, functional.layer_norm(x, (C,)) * m.weight)),
    "silu-mul": ("silu_mul", lambda m, x: gated(m, x, functional.silu)),
    "gelu-mul": ("gelu_tanh_mul", lambda m, x: gated(m, x, nn.GELU("tanh"))),
    "silu": ("silu", lambda m, x: out(m, functional.silu(out(m, x)))),
    "gelu": ("gelu", lambda m, x: out(m, functional.gelu(out(m, x)))),
    "gelu-tanh": ("gelu_tanh", lambda m, x: out(m, functional.gelu(out(m, x), approximate="tanh"))),
    "relu": ("relu", lambda m, x: out(m, functional.relu(out(m, x)))),
}  # fmt: skip


def layer_that_is_kept(m: nn.Module, x: Tensor) -> Tensor:
    h = functional.layer_norm(x, (C,), m.weight)
    return out(m, h) + h @ x.transpose(1, 2) @ x


LEFT: dict[str, tuple[str, Forward]] = {
    "residual": (USED, lambda m, x: (h := functional.silu(x)) + out(m, h)),
    "computed-with": (USED, layer_that_is_kept),
    "norm-without-its-weight-too": (
        USED, lambda m, x: out(m, m.weight * (n := rms(x).to(x.dtype))) + n
    ),
    "result": (OTHER, lambda m, x: out(m, x)),
    "other-function": (OTHER, lambda m, x: out(m, functional.leaky_relu(x))),
    "two-axes": (OTHER, lambda m, x: out(m, functional.layer_norm(x, (4, C)))),
    "mean-of-tokens": (
        OTHER, lambda m, x: out(m, x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))
    ),
    "cube": (OTHER, lambda m, x: out(m, x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))),
    "mean-of-another": (
        OTHER, lambda m, x: out(m, x * torch.rsqrt(m.bias.pow(2).mean(-1, keepdim=True) + 1e-6))
    ),
    "eps-times-two": (
        OTHER,
        lambda m, x: out(
            m, x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2))
        ),
    ),
    "wider-than-the-norm": (
        OTHER, lambda m, x: out(m, functional.layer_norm(m.bias, (C,)) * (1 + x) + x)
    ),
    "factor-for-each-token": (
        OTHER, lambda m, x: out(m, functional.layer_norm(x, (C,)) * x.mean(-1, keepdim=True))
    ),
    "difference": (OTHER, lambda m, x: out(m, torch.sub(functional.silu(x), m.bias))),
    "fp64": (OTHER, lambda m, x: out(m, functional.silu(x.double()).to(x.dtype))),
}  # fmt: skip


def model(forward: Forward, dtype: torch.dtype = torch.float32) -> nn.Module:
    weights = {
        "out": normal(C, C, seed=1),
        "both": normal(2 * C, C, seed=2),
        "weight": 1 + normal(C, seed=3),
        "bias": normal(C, seed=4),
    }
    return Function(forward, **{name: value.to(dtype) for name, value in weights.items()})


def lowered(forward: Forward, x: Tensor) -> ir.Program:
    program = program_of(model(forward, x.dtype), x, dynamic=None)
    run_passes(program, BEFORE)
    return program


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "forward"), FUSED.values(), ids=FUSED)
def test_each_pattern_becomes_one_operation_with_the_same_result(name, forward, dtype) -> None:
    x = normal(2, 4, C, seed=5).to(dtype)
    program = lowered(forward, x)
    expected = evaluate(program, x)
    result, clean = run_passes(program, "fuse-quantize,canonicalize")
    assert {k: v for k, v in result.statistics.items() if k != OTHER} == {f"{name} fused": 1}
    assert count(program, "fpq.fused_quantize") == 1
    assert not clean.statistics, "what nothing reads any more was left"
    assert all(map(torch.equal, evaluate(program, x), expected))
    again = ir.parse_program(ir.print_program(program), program.weights)
    assert all(map(torch.equal, evaluate(again, x), expected))


@pytest.mark.parametrize(("reason", "forward"), LEFT.values(), ids=LEFT)
def test_near_misses_are_left_as_they_are_and_counted(reason: str, forward: Forward) -> None:
    program = lowered(forward, normal(2, 4, C, seed=5))
    before = ir.print_program(program)
    (result,) = run_passes(program, "fuse-quantize")
    assert reason in result.statistics
    assert set(result.statistics) <= {OTHER, USED}
    assert ir.print_program(program) == before


def test_a_norm_in_16_bits_is_not_one_in_fp32() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return out(m, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight)

    program = lowered(forward, normal(2, 4, C).bfloat16())
    (result,) = run_passes(program, "fuse-quantize")
    assert result.statistics == {OTHER: 1}
    program = lowered(forward, normal(2, 4, C))
    (result,) = run_passes(program, "fuse-quantize")
    assert result.statistics == {"rms_norm fused": 1}


def test_one_value_quantized_to_two_formats_is_computed_once() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = functional.silu(x)
        return out(m, h) + functional.linear(h, m.both)[..., :C]

    program = program_of(model(forward), normal(2, 4, C), dynamic=None)
    run_passes(program, BEFORE.replace("skip=none", "skip=none;both:w4a8"))
    assert count(program, "fpq.quantize") == 2
    (result,) = run_passes(program, "fuse-quantize")
    assert result.statistics == {USED: 2}


def test_an_input_that_layers_share_is_fused_once() -> None:
    program = program_of(tiny(Attention), normal(1, 4, C))
    run_passes(program, BEFORE)
    (result,) = run_passes(program, "fuse-quantize")
    assert result.statistics == {"layer_norm fused": 1, OTHER: 1}
    (op,) = program.operations("fpq.fused_quantize")
    assert len(list(op.results[0].uses)) == 3
    assert count(program, "torch.aten.layer_norm") == 0


def test_the_pass_wants_chosen_kernels() -> None:
    program = program_of(tiny(Attention), normal(1, 4, C))
    with pytest.raises(PassError, match="fuse-quantize needs a program at stage lowered"):
        run_passes(program, "normalize,fuse-quantize")


@pytest.mark.parametrize(
    ("name", "dtype", "fused"),
    [
        ("hf-llama", torch.float32, {"rms_norm": 4, "silu_mul": 2}),
        ("hf-llama", torch.bfloat16, {"rms_norm": 4, "silu_mul": 2}),
        ("hf-gemma", torch.bfloat16, {"rms_norm_wide": 4, "gelu_tanh_mul": 2}),
        ("hf-opt", torch.float16, {"layer_norm": 4, "relu": 2}),
        ("hf-bert", torch.float32, {"gelu": 2}),  # its norms are followed by residual sums
    ],
)
def test_models_of_hugging_face(name: str, dtype: torch.dtype, fused: dict[str, int]) -> None:
    ids = token_ids(2, 12)
    source = capture(hf_model(name).to(dtype), (ids,), {}, dynamic=None)
    results = []
    for pipeline in (without_fusing(FULL), FULL):
        program = import_named(source)
        steps = run_pipeline(program, pipeline)
        plan, weights = emit_plan(program, source.signature, source.placeholders, source.symbols)
        results.append(Executor(plan, weights).run_leaves([ids]))
    *_, quantizers, _, _, _ = steps
    found = quantizers.statistics
    assert {k: v for k, v in found.items() if k.endswith(" fused")} == {
        f"{kind} fused": number for kind, number in fused.items()
    }
    assert all(map(torch.equal, *results))


def test_an_operand_without_scales_runs_too() -> None:
    x, scheme = normal(2, 4, C), "w=f4E2M1FN@row:f32,a=f8E5M2,skip=none"
    network = model(lambda m, x: out(m, functional.silu(x)))
    compiled = fpcompiler.compile(network, scheme, example_inputs=x)
    first, _ = compiled.artifact.plan.steps
    assert (first.op, len(first.outs)) == ("fpc.fused_quantize", 1)
    plain = fpcompiler.compile(
        network, example_inputs=x, pipeline=without_fusing(default_pipeline(scheme))
    )
    assert torch.equal(compiled(x), plain(x))


def test_layers_are_compared_as_before_fusing() -> None:
    torch.manual_seed(0)
    network = DiT(Config(width=C, depth=2, heads=2)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    call = (normal(2, 1, 28, 28), torch.tensor([3, 700]), torch.tensor([1, 4]))
    fused, plain = (
        fpcompiler.compile(network, example_inputs=call, pipeline=items)
        for items in (FULL, without_fusing(FULL))
    )
    operations = [step.op for step in fused.artifact.plan.steps]
    assert operations.count("fpc.fused_quantize") == 2 * 3 + 1 + 2  # blocks; last norm; condition
    # A shift that is not part of a quantizer becomes a residual, behind which its layer runs then.
    found, expected = ({r.name: r for r in m.compare(network, [call]).rows} for m in (fused, plain))
    assert found == expected
