"""``quantize-attention``: what attention multiplies is on the grid of a format."""

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import numerics
from fpcompiler.errors import FormatError, PassError
from fpcompiler.operand import Operand
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
