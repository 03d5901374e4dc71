"""Learned rounding from Gram matrices, and the flips that end it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics.adaround import LayersResult, RoundOptions, round_layers
from fpcompiler.numerics.adaround.flips import flip
from tests.models import normal
from tests.numerics.adaround.problems import correlated, soften
from tests.numerics.adaround.test_soft import OPERANDS

FAST = RoundOptions(iterations=100)
E2M1 = "f4E2M1FN@row:f32/block32:f8E8M0FNU"


def grams(layers: int, k: int, seed: int = 0, tokens: int = 600) -> Tensor:
    inputs = [correlated(tokens, k, seed + layer) for layer in range(layers)]
    return torch.stack([x.T @ x for x in inputs])


def round_one(weight: Tensor, text: str, learn: Tensor, held: Tensor) -> LayersResult:
    return round_layers(weight, soften(weight, text), learn, held, FAST)


@pytest.mark.parametrize("text", OPERANDS)
def test_every_format_gains_clearly(text: str) -> None:
    weight = normal(1, 16, 96)
    result = round_one(weight, text, grams(1, 96), grams(1, 96, seed=50))
    assert bool(result.kept.all())
    assert float((result.error / result.nearest_error).max()) < 0.35


def test_the_error_told_is_that_of_the_tokens() -> None:
    weight, x = normal(1, 8, 64), correlated(300, 64, 50)
    soft = soften(weight, E2M1)
    result = round_layers(weight, soft, grams(1, 64), (x.T @ x)[None], FAST)
    for codes, told in ((result.codes, result.error), (soft.nearest, result.nearest_error)):
        outputs = x.double() @ (soft.values(codes)[0] - weight[0]).double().T
        # The Gram matrix was summed in fp32.
        assert float(told) == pytest.approx(float(outputs.square().sum()), rel=1e-4)


def test_layers_together_are_those_alone() -> None:
    weight, learn, held = normal(3, 8, 64), grams(3, 64), grams(3, 64, seed=50)
    together = round_one(weight, E2M1, learn, held)
    for index in range(3):
        own = slice(index, index + 1)
        alone = round_one(weight[own], E2M1, learn[own], held[own])
        # Sums in another order lead to other flips, and the best check is that of all layers.
        torch.testing.assert_close(alone.error[0], together.error[index], rtol=0.1, atol=0)


def test_only_what_gains_is_kept() -> None:
    weight, learn = normal(2, 8, 64), grams(2, 64)
    held = learn.clone()
    held[1] = torch.eye(64)  # with independent inputs nothing is better than the nearest
    soft = soften(weight, E2M1)
    result = round_layers(weight, soft, learn, held, FAST)
    assert result.kept.tolist() == [True, False]
    assert torch.equal(result.codes[1], soft.nearest[1])
    assert not torch.equal(result.codes[0], soft.nearest[0])


@settings(deadline=None, max_examples=15)
@given(st.integers(-40, 40), st.integers(-40, 40), st.sampled_from(OPERANDS[:4]))
def test_the_size_of_weights_and_inputs_does_not_matter(a: int, b: int, text: str) -> None:
    weight, gram = normal(1, 4, 40), grams(1, 40)
    options = RoundOptions(iterations=30)
    plain = round_layers(weight, soften(weight, text), gram, gram, options)
    scaled = weight * 2.0**a
    result = round_layers(scaled, soften(scaled, text), gram * 2.0**b, gram * 2.0**b, options)
    assert torch.equal(result.codes, plain.codes)


def test_a_weight_on_the_grid_stays() -> None:
    soft = soften(normal(1, 8, 64), E2M1)
    grid = soft.values(soft.nearest)
    result = round_one(grid, E2M1, grams(1, 64), grams(1, 64))
    assert torch.equal(result.codes, soft.nearest)
    assert float(result.error) == float(result.nearest_error) == 0


def test_inputs_that_are_zero_change_nothing() -> None:
    soft = soften(normal(1, 8, 64), E2M1)
    zero = torch.zeros(1, 64, 64)
    result = round_layers(normal(1, 8, 64), soft, zero, zero, FAST)
    assert not bool(result.kept)
    assert torch.equal(result.codes, soft.nearest)


def test_no_single_flip_is_left() -> None:
    gram = grams(1, 12).double()
    width = 0.5 + normal(1, 6, 12, seed=3).double().abs()
    start = torch.zeros(1, 6, 12, dtype=torch.bool)
    up = flip(start, -width * 0.4, width, gram)
    difference = -width * 0.4 + width * up
    errors = torch.einsum("lnk,lkj,lnj->ln", difference, gram, difference)
    for column in range(12):
        turned = difference.clone()
        turned[..., column] += torch.where(up, -width, width)[..., column]
        other = torch.einsum("lnk,lkj,lnj->ln", turned, gram, turned)
        assert bool((other >= errors * (1 - 1e-4)).all())


def test_flips_of_two_columns_find_the_best_of_all_four() -> None:
    gram = torch.tensor([[[2.0, 1.9], [1.9, 2.0]]])
    width = torch.ones(1, 1, 2)
    difference = torch.tensor([[[-0.4, -0.4]]])
    up = flip(torch.zeros(1, 1, 2, dtype=torch.bool), difference, width, gram)
    candidates = [
        difference + width * torch.tensor(choice)
        for choice in itertools.product((0.0, 1.0), repeat=2)
    ]
    errors = [float((d @ gram * d).sum()) for d in candidates]
    chosen = difference + width * up
    assert float((chosen @ gram * chosen).sum()) == pytest.approx(min(errors))


def test_shapes_that_do_not_fit_name_the_layer() -> None:
    weight = normal(1, 4, 32)
    with pytest.raises(NumericsError, match=r"^layer 'qkv': weights, neighbours and Gram matrices"):
        round_layers(weight, soften(weight, E2M1), grams(1, 32), grams(1, 16), FAST, layer="qkv")


def test_a_gram_matrix_that_is_no_number_names_the_layer() -> None:
    weight, bad = normal(1, 4, 32), grams(1, 32) * torch.nan
    with pytest.raises(NumericsError, match=r"^layer 'qkv': a Gram matrix of its input holds NaN"):
        round_layers(weight, soften(weight, E2M1), bad, bad, FAST, layer="qkv")
