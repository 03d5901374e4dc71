"""``quantize-attention``: what attention multiplies is on the grid of a format."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import numerics
from fpcompiler.errors import FormatError, PassError
from fpcompiler.ir import Program
from fpcompiler.operand import Operand
from fpcompiler.passes import PASSES, Pass, PassContext, parse_pipeline
from fpcompiler.passes.decompose_attention import FUSED, decompose_attention
from tests.passes.tiny import Attention, Mlp, tiny

KEPT = "w4a16; re:.*: skip"
X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))


def quantized(x: Tensor, operand: str) -> Tensor:
    parsed = Operand.parse(operand)
    return numerics.dequantize(*numerics.quantize(x, parsed), parsed)


class Products(nn.Module):
    """Attention as two products."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v


class Product(nn.Module):
    """One product of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Fused(nn.Module):
    """The fused operator with some of its options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


@dataclass(frozen=True)
class Decompose(Pass):
    """Replace fused attention by its parts, and change nothing else."""

    name: ClassVar[str] = "decompose"

    def run(self, program: Program, context: PassContext) -> None:
        for op in program.operations(FUSED):
            decompose_attention(op, lambda weights: weights)


def decomposed(model: nn.Module, inputs: tuple[Tensor, ...]) -> fpcompiler.CompiledModel:
    text = f'cse,normalize,insert-quantize{{scheme="{KEPT}"}},decompose,lower-gemm'
    pipeline = parse_pipeline(text, {**PASSES, Decompose.name: Decompose})
    compiled = fpcompiler.compile(model, example_inputs=inputs, pipeline=pipeline)
    assert not [step for step in compiled.artifact.plan.steps if "attention" in step.op]
    return compiled


def heads(count: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count * tokens)
    return torch.randn(2, count, tokens, 16, generator=generator).to(dtype)


NO_KEY = (torch.arange(35).view(5, 7) % 3 > 0).index_fill(0, torch.tensor(2), False)
"""A mask that leaves the query 2 nothing to attend to."""


@pytest.mark.parametrize(
    ("options", "groups", "mask"),
    [
        ({}, 4, None),
        ({"is_causal": True}, 4, None),
        ({"scale": 0.3}, 4, None),
        ({"enable_gqa": True}, 2, None),
        ({"enable_gqa": True, "is_causal": True}, 1, None),
        ({}, 4, NO_KEY),
        ({}, 4, torch.linspace(-3, 2, 35).view(5, 7)),
        ({"enable_gqa": True}, 2, torch.linspace(-3, 2, 70).view(2, 1, 5, 7)),
    ],
)
def test_the_parts_compute_what_the_fused_operator_does(
    options: dict[str, Any], groups: int, mask: Tensor | None
) -> None:
    inputs = (heads(4, 5), heads(groups, 7), heads(groups, 7) + 1)
    inputs += () if mask is None else (mask,)
    model = Fused(**options)
    # Values up to 4, weights that sum to 1: 16 roundings of 2**-24 relative to 4.
    torch.testing.assert_close(
        decomposed(model, inputs)(*inputs), model(*inputs), rtol=0, atol=4e-6
    )


def test_the_parts_fit_calls_of_other_lengths() -> None:
    model = tiny(Attention)
    compiled = decomposed(model, (X,))
    for x in (X[:, :5], X[:1]):
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    inputs = (heads(4, 5, dtype), heads(4, 7, dtype), heads(4, 7, dtype))
    result = decomposed(Fused(is_causal=True), inputs)(*inputs)
    exact = Fused(is_causal=True)(*(value.float() for value in inputs))
    assert result.dtype == dtype
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("qkv", ["", "f8E4M3FN@token:f32"])
def test_weights_of_fused_attention_are_quantized(qkv: str) -> None:
    weights = "f4E2M1FN@token:f32"
    text = f"qkv={qkv},weights={weights}" if qkv else f"weights={weights}"
    inputs = (heads(4, 5), heads(4, 7), heads(4, 7))
    compiled = fpcompiler.compile(Fused(), "w4a16", example_inputs=inputs, attention=text)
    q, k, v = (quantized(value, qkv) for value in inputs) if qkv else inputs
    p = quantized(torch.softmax(q @ k.transpose(-1, -2) / 4, -1), weights)
    torch.testing.assert_close(compiled(*inputs), p @ v, rtol=0, atol=4e-6)


def test_weights_of_written_out_attention_have_their_own_format() -> None:
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    compiled = fpcompiler.compile(
        Products(), "w4a16", example_inputs=(q, k, v), attention="weights=f6E3M2FN@token:f32"
    )
    p = quantized(torch.softmax(q @ k.transpose(-1, -2), -1), "f6E3M2FN@token:f32")
    torch.testing.assert_close(compiled(q, k, v), p @ v, rtol=0, atol=1e-6)


def test_weights_that_do_not_exist_or_are_dropped_are_refused() -> None:
    inputs = (heads(2, 5), heads(2, 5).transpose(-1, -2))
    with pytest.raises(PassError, match="no product has the result of a softmax"):
        fpcompiler.compile(
            Product(), "w4a16", example_inputs=inputs, attention="weights=f8E4M3FN@token:f32"
        )
    inputs = tuple(heads(2, 5) for _ in range(3))
    with pytest.raises(PassError, match=r"it has dropout \(call model.eval\(\)\)"):
        decomposed(Fused(dropout_p=0.5), inputs)


def test_blocks_need_a_known_number_of_keys() -> None:
    with pytest.raises(PassError, match=r"an axis of unknown length .* Choose token:f32"):
        fpcompiler.compile(
            tiny(Attention),
            KEPT,
            example_inputs=(X,),
            attention="weights=f4E2M1FN@block16:f8E4M3FN",
        )


@pytest.mark.parametrize("operand", ["f8E4M3FN@token:f32", "f6E2M3FN@tensor:f32"])
def test_fused_attention_sees_quantized_values(
    operand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(Attention)
    compiled = fpcompiler.compile(model, KEPT, example_inputs=(X,), attention=operand)
    attend = torch.nn.functional.scaled_dot_product_attention

    def on_the_grid(q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Tensor:
        return attend(*(quantized(value, operand) for value in (q, k, v)), **options)

    monkeypatch.setattr("tests.passes.tiny.functional.scaled_dot_product_attention", on_the_grid)
    torch.testing.assert_close(compiled(X), model(X), rtol=0, atol=1e-6)


def test_products_are_quantized_along_what_they_contract() -> None:
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    operand = "f4E2M1FN@token:f32"
    compiled = fpcompiler.compile(Products(), "w4a16", example_inputs=(q, k, v), attention=operand)
    scores = quantized(q, operand) @ quantized(k, operand).transpose(-1, -2)
    weights = quantized(torch.softmax(scores, -1), operand)
    values = quantized(v.transpose(-1, -2), operand).transpose(-1, -2)
    torch.testing.assert_close(compiled(q, k, v), weights @ values, rtol=0, atol=1e-6)


def test_tokens_do_not_depend_on_each_other() -> None:
    """So that a cache of quantized keys and values gives the same."""
    compiled = fpcompiler.compile(
        tiny(Attention), KEPT, example_inputs=(X,), attention="f8E4M3FN@token:f32"
    )
    whole = compiled(X)
    torch.testing.assert_close(compiled(X[:, :5]), whole[:, :5], rtol=0, atol=1e-6)


def test_it_is_off_by_default_and_saved_with_the_model(tmp_path) -> None:
    model = tiny(Attention)
    assert torch.equal(fpcompiler.compile(model, KEPT, example_inputs=(X,))(X), model(X))
    compiled = fpcompiler.compile(
        model, "w4a6", example_inputs=(X,), attention="f8E4M3FN@token:f32"
    )
    compiled.save(tmp_path / "model.fpc")
    assert torch.equal(fpcompiler.load(tmp_path / "model.fpc")(X), compiled(X))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(PassError, match="no attention and no product of two activations"):
        fpcompiler.compile(tiny(Mlp), "w4a6", example_inputs=(X,), attention="f8E4M3FN@token:f32")


def test_an_operand_that_means_nothing_is_refused() -> None:
    with pytest.raises(FormatError, match="no format 'f5'"):
        fpcompiler.compile(tiny(Attention), example_inputs=(X,), attention="f5@token:f32")
