"""The predicted damage of rounded weights: against the model itself, and its parts."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import dequantize, quantize, quantize_packed
from fpcompiler.numerics.mixed import model_damage, output_damage, stored_bits
from fpcompiler.operand import Operand
from tests.models import normal

OPERAND = Operand.parse("f4E2M1FN@row:f32")


def rounded(weight: torch.Tensor, operand: Operand = OPERAND) -> torch.Tensor:
    return dequantize(*quantize(weight, operand), operand)


def test_it_is_the_squared_change_of_the_output() -> None:
    # Of a layer with one output and a factor for each token it is exact, whatever the inputs are.
    weight, x, factors = normal(1, 24), normal(40, 24, seed=1), normal(40, 1, seed=2)
    other = rounded(weight)
    change = factors * (x @ other.T) - factors * (x @ weight.T)
    damage = model_damage(weight, other, x, factors.square(), tokens=40)
    assert damage == pytest.approx(float(change.square().sum()), rel=1e-4)


def test_a_sample_stands_for_all_tokens() -> None:
    weight, x, gradients = normal(6, 24), normal(40, 24, seed=1), torch.ones(40, 6)
    once = model_damage(weight, rounded(weight), x, gradients, tokens=40)
    assert model_damage(weight, rounded(weight), x, gradients, tokens=120) == pytest.approx(
        3 * once
    )


def test_tokens_without_gradients_do_not_count() -> None:
    # A token with huge inputs, as the first of a text often is, that the output ignores.
    weight, x, gradients = normal(6, 24), normal(40, 24, seed=1), torch.ones(40, 6)
    before = model_damage(weight, rounded(weight), x, gradients, tokens=40)
    x[0] *= 1000
    gradients[0] = 0
    assert model_damage(weight, rounded(weight), x, gradients, tokens=40) < before


def test_the_error_of_a_layer_does_not_depend_on_its_scale() -> None:
    weight, x = normal(6, 24), normal(40, 24, seed=1)
    wanted = float(
        (x @ (rounded(weight) - weight).T).square().sum() / (x @ weight.T).square().sum()
    )
    assert output_damage(weight, rounded(weight), x.T @ x) == pytest.approx(wanted, rel=1e-4)
    big = 8 * weight
    assert output_damage(big, rounded(big), 9 * (x.T @ x)) == pytest.approx(wanted, rel=1e-4)
    assert output_damage(weight, rounded(weight), torch.zeros(24, 24)) == 0.0


@pytest.mark.parametrize("k", [32, 33, 100])
@pytest.mark.parametrize(
    "text",
    [
        "f4E2M1FN@row:f32/block32:f8E8M0FNU", "f6E2M3FN@block32:f8E8M0FNU",
        "f8E4M3FN@row:f32", "f4E2M1FN@tensor:f32/block16:f8E4M3FN", "f6E3M2FN@block64:f32",
    ],
)  # fmt: skip
def test_bits_are_those_of_what_is_stored(text: str, k: int) -> None:
    operand = Operand.parse(text)
    packed, scales = quantize_packed(normal(5, k), operand)
    stored = 8 * (packed.nbytes + sum(scale.nbytes for scale in scales))
    assert stored_bits(5, k, operand) == stored


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, x = normal(6, 24), normal(40, 24)
    for bad in (torch.ones(40, 5), torch.ones(39, 6)):
        with pytest.raises(NumericsError, match=r"'up': a weight \[6, 24\], .* do not fit"):
            model_damage(weight, weight, x, bad, tokens=40, layer="up")
    with pytest.raises(NumericsError, match="do not fit"):
        model_damage(weight, weight, x[:0], torch.ones(0, 6), tokens=0)
    with pytest.raises(NumericsError, match="do not fit"):
        output_damage(weight, weight, torch.eye(23))
