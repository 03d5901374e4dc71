"""The soft weight: FP4DiT's worked numbers, and what holds for every operand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode, dequantize, expand_scale, quantize, quantize_with
from fpcompiler.numerics.adaround import Parametrization, SoftWeight
from fpcompiler.numerics.adaround.neighbours import code_of, lower_position, upper_position
from fpcompiler.operand import Operand
from fpcompiler.scheme.presets import PRESETS
from tests.models import normal

OPERANDS = sorted(
    {preset.weight for preset in PRESETS.values()}
    | {f"{name}@block128:f32" for name in ("f4E2M1FN", "f4E3M0FN", "f4E1M2FN", "f6E3M2FN")}
    | {"f8E4M3FN@row:f32", "f8E5M2@tensor:f32", "f8E3M4FN@block16:f8E8M0FNU:ceil", "f8E3M4"}
)

WORKED = torch.tensor([0.43, -0.17, 0.08, -0.021])
"""The weights of the worked example. The first is the largest number itself and is left out."""

EXPECTED = {
    "e2m1": {
        "step": [0.071667, 0.035833, 0.035833],
        "rest": [0.627907, 0.232558, 0.413953],
        "alpha": [0.432997, -0.958734, -0.288813],
        "learned": [0.031031, -0.034355, -0.010349],
        "slope": [0.286367, 0.240396, 0.293830],
        "down": [-0.215, 0.071667, -0.035833],
        "up": [-0.143333, 0.1075, 0.0],
        "floor": [-3.0, 2.0, -1.0],
    },
    "e3m0": {
        "step": [0.1075, 0.05375, 0.013437],
        "rest": [0.418605, 0.488372, 0.437209],
        "alpha": [-0.273001, -0.038765, -0.210071],
        "learned": [-0.029348, -0.002084, -0.002823],
        "slope": [0.294479, 0.299887, 0.296714],
        "down": [-0.215, 0.05375, -0.026875],
        "up": [-0.1075, 0.1075, -0.013437],
        "floor": [-2.0, 1.0, -2.0],
    },
}


def soft_weight(
    weight: Tensor, text: str, parametrization: Parametrization = Parametrization.LOGIT
) -> SoftWeight:
    operand = Operand.parse(text)
    _, scales = quantize(weight, operand)
    return SoftWeight.of(weight, scales, operand, parametrization=parametrization)


@pytest.mark.parametrize("name", EXPECTED)
def test_worked_numbers(name: str) -> None:
    weight = soft_weight(WORKED, f"{name}@row:f32", Parametrization.SCALE_AWARE)
    unit = weight.scales[0]  # what is learned is in units of the scale
    learned = weight.initial().requires_grad_()
    soft = weight.soft(learned)
    soft.sum().backward()
    assert learned.grad is not None
    found = {
        "step": weight.width,
        "rest": weight.rest,
        "alpha": weight.alpha(learned),
        "learned": learned * unit,
        "slope": learned.grad / unit,
        "down": weight.low,
        "up": weight.low + weight.width,
        "floor": weight.low / weight.width,
    }
    for key, wanted in EXPECTED[name].items():
        expected = torch.tensor(wanted)
        # Six decimals, of which the last is rounded, and fp32.
        torch.testing.assert_close(found[key].detach()[1:], expected, atol=1.5e-6, rtol=2e-6)
    torch.testing.assert_close(soft.detach(), WORKED, atol=1e-7, rtol=0)


def test_the_plain_logit_moves_a_value_by_its_step() -> None:
    weight = soft_weight(WORKED, "e2m1@row:f32")
    learned = weight.initial().requires_grad_()
    weight.soft(learned).sum().backward()
    sigma = learned.detach().sigmoid()
    assert learned.grad is not None
    torch.testing.assert_close(learned.grad, weight.width * 1.2 * sigma * (1 - sigma))


def test_the_largest_number_has_no_other_above_it() -> None:
    weight = soft_weight(WORKED, "e3m0@row:f32")
    assert float(weight.low[0]) == pytest.approx(0.43)
    assert float(weight.width[0]) == 0


@pytest.mark.parametrize("name", [spec.name for spec in FORMATS.values() if spec.signed])
def test_the_neighbours_of_all_numbers_and_middles(name: str) -> None:
    spec = FORMATS[name]
    numbers = torch.tensor(sorted({v for v in spec.values if math.isfinite(v)}))
    middles = (numbers[1:] + numbers[:-1]) / 2
    above_numbers = torch.cat([numbers[1:], numbers[-1:]])
    cases = ((numbers, numbers, above_numbers), (middles, numbers[:-1], numbers[1:]))
    for values, below, above in cases:
        lower = lower_position(values, spec)
        upper = upper_position(lower, spec)
        assert torch.equal(decode(code_of(lower, values < 0, spec), spec), below)
        assert torch.equal(decode(code_of(upper, values < 0, spec), spec), above)


@pytest.mark.parametrize("parametrization", Parametrization)
@pytest.mark.parametrize("text", OPERANDS)
def test_at_the_start_it_is_the_clipped_weight(text: str, parametrization: Parametrization) -> None:
    plain = normal(6, 150) ** 3
    weight = soft_weight(plain * 0.6, text, parametrization)
    weight = SoftWeight.of(plain, weight.scales, weight.operand, parametrization=parametrization)
    spec = weight.operand.format
    total = expand_scale(weight.scales, weight.operand, 150) if weight.scales else torch.ones(1)
    clipped = torch.minimum(torch.maximum(plain, -total * spec.max), total * spec.max)
    # h is rounded at 1 (1e-7), and so are the logarithm and the sigmoid: within 1e-6 of a step.
    error = (weight.soft(weight.initial()) - clipped).abs()
    assert bool((error <= 1e-6 * weight.width + 2.0**-22 * clipped.abs()).all())
    assert bool(((weight.rest >= 0) & (weight.rest <= 1)).all())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(OPERANDS), st.integers(1, 5), st.integers(1, 140), st.integers(0, 999))
def test_hard_values_are_the_neighbours(text: str, rows: int, k: int, seed: int) -> None:
    plain = normal(rows, k, seed=seed) ** 3
    weight = soft_weight(plain, text)
    down, up = (weight.codes(torch.full_like(plain, sign)) for sign in (-1.0, 1.0))
    total = expand_scale(weight.scales, weight.operand, k) if weight.scales else torch.ones(1)
    quotient = (plain / total).clamp(-weight.operand.format.max, weight.operand.format.max)
    low, high = (decode(codes, weight.operand.format) for codes in (down, up))
    assert bool(((low <= quotient) & (quotient <= high)).all())
    assert torch.equal(weight.values(down), weight.low)
    # Nothing lies between: rounding anything between the two gives one of them.
    middle = quantize_with((low + high) / 2 * total, weight.scales, weight.operand)
    assert bool(((middle == down) | (middle == up) | (high == low)).all())


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(OPERANDS), st.integers(0, 999))
def test_hard_values_at_the_start_are_round_to_nearest(text: str, seed: int) -> None:
    plain = normal(4, 70, seed=seed)
    weight = soft_weight(plain, text)
    codes = weight.codes(weight.initial())
    tie = (weight.rest - 0.5).abs() < 1e-6
    assert torch.equal(codes[~tie], weight.nearest[~tie])


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([t for t in OPERANDS if "@" in t]),
    st.integers(-30, 30),
    st.sampled_from(Parametrization),
)
def test_what_is_learned_does_not_depend_on_the_scale(
    text: str, power: int, parametrization: Parametrization
) -> None:
    plain = normal(4, 70)
    weight = soft_weight(plain, text, parametrization)
    scaled = soft_weight(plain * 2.0**power, text, parametrization)
    assert torch.equal(scaled.initial(), weight.initial())
    assert torch.equal(scaled.width, weight.width * 2.0**power)


@pytest.mark.parametrize("text", OPERANDS)
def test_a_weight_on_the_grid_is_the_lower_neighbour(text: str) -> None:
    operand = Operand.parse(text)
    codes, scales = quantize(normal(5, 96), operand)
    grid = dequantize(codes, scales, operand)
    weight = SoftWeight.of(grid, scales, operand)
    # decode(code) * total / total may be a unit in the last place off the code's value.
    near = torch.minimum(weight.rest, 1 - weight.rest)
    assert float(near.max()) < 1e-5
    assert torch.equal(weight.values(weight.codes(weight.initial())), grid)


def test_many_layers_are_one_weight() -> None:
    operand = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")
    layers = [normal(4, 40, seed=seed) * (1 + seed) for seed in range(3)]
    own = [quantize(layer, operand)[1] for layer in layers]
    stacked = tuple(torch.stack(level) for level in zip(*own, strict=True))
    together = SoftWeight.of(torch.stack(layers), stacked, operand)
    for index, (layer, scales) in enumerate(zip(layers, own, strict=True)):
        alone = SoftWeight.of(layer, scales, operand)
        assert torch.equal(together.low[index], alone.low)
        assert torch.equal(together.rest[index], alone.rest)


def test_scales_that_are_no_numbers_name_the_layer() -> None:
    operand = Operand.parse("e2m1@row:f32")
    with pytest.raises(NumericsError, match=r"^layer 'fc1': a scale is not a positive number"):
        SoftWeight.of(torch.ones(2, 4), (torch.zeros(2, 1),), operand, layer="fc1")


def test_a_weight_that_is_no_number_names_the_layer() -> None:
    operand = Operand.parse("e2m1@row:f32")
    with pytest.raises(NumericsError, match=r"^layer 'fc1': input holds NaN/Inf"):
        SoftWeight.of(torch.full((2, 4), torch.nan), (torch.ones(2, 1),), operand, layer="fc1")
