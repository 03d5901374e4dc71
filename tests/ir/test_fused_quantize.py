"""The verifier of fpq.fused_quantize, and what the operation is raised to."""

from __future__ import annotations

import pytest
import torch

from fpcompiler import ir
from fpcompiler.errors import IRError
from tests.models import normal
from tests.programs import evaluate

X = "!torch.vtensor<[2,3,64],bf16>"
ROW = "!torch.vtensor<[64],bf16>"
EACH = "!torch.vtensor<[2,1,64],f32>"
RESULT = '!fpq.quantized<tensor<2x3x64xf6E2M3FN>, "block32:f8E8M0FNU">'
NONE = "!torch.none"


def text(
    producer: str,
    weight: str = NONE,
    bias: str = NONE,
    scale: str = NONE,
    shift: str = NONE,
    x: str = X,
    result: str = RESULT,
    eps: str = "1.0e-5",
) -> str:
    """Return a module that is one operation; what it reads are the arguments that there are."""
    kinds = [x, weight, bias, scale, shift]
    names = ["%none" if kind == NONE else f"%a{i}" for i, kind in enumerate(kinds)]
    pairs = (f"{n}: {k}" for n, k in zip(names, kinds, strict=True) if k != NONE)
    return f"""
    func.func @main({", ".join(pairs)}) -> {x} {{
      %none = torch.constant.none
      %q = "fpq.fused_quantize"({", ".join(names)}) {{producer = "{producer}", eps = {eps} : f64}}
        : ({", ".join(kinds)}) -> {result} loc("q"("model.layer"("net.py":12:0)))
      %y = "fpq.dequantize"(%q) : ({result}) -> {x}
      return %y : {x}
    }}"""


DYNAMIC = "!torch.vtensor<[?,?,64],f32>"
DYNAMIC_RESULT = RESULT.replace("2x3", "?x?")

GOOD = {
    "rms": text("rms_norm", weight=ROW),
    "rms-plain": text("rms_norm_wide"),
    "layer-norm": text("layer_norm", weight=ROW, bias=ROW),
    "modulate": text("layer_norm_modulate", scale=EACH, shift=EACH),
    "modulate-no-shift": text("rms_norm_modulate", scale=EACH),
    "gated": text("gelu_tanh_mul", scale=DYNAMIC, x=DYNAMIC, result=DYNAMIC_RESULT),
    "shifted-row": text("layer_norm_add", shift=ROW),
}


@pytest.mark.parametrize("module", GOOD.values(), ids=GOOD)
def test_valid_operations_print_and_parse(module: str) -> None:
    parsed = ir.parse_program(module)
    parsed.verify()
    printed = ir.print_program(parsed)
    assert ir.print_program(ir.parse_program(printed)) == printed


BAD = {
    "unknown": (text("softmax"), 'there is no producer "softmax"'),
    "missing": (text("silu_mul"), "silu_mul needs a scale"),
    "needless": (text("gelu", weight=ROW), "gelu has no weight"),
    "needless-bias": (text("rms_norm", bias=ROW), "rms_norm has no bias"),
    "fp64": (
        text("relu", x=X.replace("bf16", "f64")),
        "input must hold f32, f16, bf16, not f64",
    ),
    "weight-of-another-length": (
        text("rms_norm", weight="!torch.vtensor<[32],bf16>"),
        "weight: shape [32] does not fit [2, 3, 64]",
    ),
    "weight-with-axes": (
        text("rms_norm", weight="!torch.vtensor<[1,64],bf16>"),
        "weight: shape [1, 64] does not fit [2, 3, 64]",
    ),
    "scale-for-each-token": (
        text("silu_mul", scale="!torch.vtensor<[2,3,1],bf16>"),
        "scale: shape [2, 3, 1] does not fit [2, 3, 64]",
    ),
    "larger": (
        text("silu_mul", scale="!torch.vtensor<[5,2,3,64],bf16>"),
        "scale: shape [5, 2, 3, 64] does not fit [2, 3, 64]",
    ),
    "perhaps-larger": (
        text("silu_mul", scale=DYNAMIC, x=X),
        "scale: shape [?, ?, 64] does not fit [2, 3, 64]",
    ),
    "result": (
        text("silu", result=RESULT.replace("2x3", "3x3")),
        "result: shape [3, 3, 64] is not [2, 3, 64]",
    ),
    "eps": (text("rms_norm", eps="-1.0"), "eps must be finite and not negative, not -1.0"),
}


@pytest.mark.parametrize(("module", "message"), BAD.values(), ids=BAD)
def test_wrong_operations_are_refused_with_their_place(module: str, message: str) -> None:
    with pytest.raises(IRError) as caught:
        ir.parse_program(module).verify()
    assert f"'fpq.fused_quantize' op {message}" in str(caught.value)
    assert '"model.layer"("net.py":12:0)' in str(caught.value)


def test_the_operation_is_raised_to_the_operator() -> None:
    program = ir.parse_program(text("layer_norm_modulate", scale=EACH, shift=EACH))
    x = normal(2, 3, 64).bfloat16()
    scale, shift = normal(2, 1, 64, seed=1), normal(2, 1, 64, seed=2)
    operand, slots = "f6E2M3FN@block32:f8E8M0FNU", (None, None, scale, shift)
    parts = torch.ops.fpc.fused_quantize(
        x, *slots, "layer_norm_modulate", 1e-5, operand, "model.layer"
    )
    expected = torch.ops.fpc.dequantize(parts, operand, torch.bfloat16)
    (found,) = evaluate(program, x, scale, shift)
    assert torch.equal(found, expected)
    graph = ir.raise_to_fx(program).graph
    (node,) = (n for n in graph.nodes if n.target is torch.ops.fpc.fused_quantize.default)
    assert node.args[1:3] == (None, None)
    assert node.args[5:] == ("layer_norm_modulate", 1e-5, operand, "model.layer")
