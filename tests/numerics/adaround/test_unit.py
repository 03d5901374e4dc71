"""Learned rounding of a unit: what it gains, and what it promises whatever the data."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.numerics.adaround import Ended, RoundOptions, UnitResult, round_unit
from tests.models import normal
from tests.numerics.adaround.problems import Data, correlated, linear, mlp, soften
from tests.numerics.adaround.test_soft import OPERANDS

FAST = RoundOptions(iterations=200, batch=8, patience=0)
E2M1 = "f4E2M1FN@row:f32/block32:f8E8M0FNU"


def layer_data(weight: Tensor, samples: int, seed: int, factor: float = 1.0) -> Data:
    x = correlated(samples * 16, weight.shape[1], seed).view(samples, 16, -1) * factor
    return Data(x, x @ weight.T)


def round_layer(
    weight: Tensor, text: str, options: RoundOptions = FAST, factor: float = 1.0
) -> UnitResult:
    data = [layer_data(weight, count, seed, factor) for count, seed in ((32, 0), (8, 50))]
    return round_unit(linear, [soften(weight, text)], *data, options)


@pytest.mark.parametrize("text", ["e2m1@block128:f32", "e3m0@block128:f32", E2M1, "e2m3@row:f32"])
def test_a_layer_gains_clearly(text: str) -> None:
    result = round_layer(0.02 * normal(24, 64), text)
    assert result.kept
    assert result.error < 0.5 * result.nearest_error
    assert result.iterations == 200
    assert result.ended is Ended.ITERATIONS


def test_a_block_gains_clearly() -> None:
    weights = [normal(96, 32, seed=1) / 32**0.5, normal(32, 96, seed=2) / 96**0.5]
    inputs = [
        correlated(count * 8, 32, seed).view(count, 8, 32) for count, seed in ((64, 0), (16, 50))
    ]
    data = [Data(x, mlp(weights, (x,))) for x in inputs]
    result = round_unit(
        mlp, [soften(weight, "e2m1@block16:f8E4M3FN") for weight in weights], *data, FAST
    )
    assert result.kept
    assert result.error < 0.6 * result.nearest_error


@pytest.mark.parametrize("text", OPERANDS)
def test_the_error_told_is_that_of_the_codes(text: str) -> None:
    weight = normal(8, 64)
    result = round_layer(weight, text, RoundOptions(iterations=40, patience=0))
    soft, held = soften(weight, text), layer_data(weight, 8, 50)
    for codes, told in ((soft.nearest, result.nearest_error), (result.codes[0], result.error)):
        if codes is soft.nearest or result.kept:
            error = (held.inputs @ soft.values(codes).T - held.targets).double().square().mean()
            assert told == pytest.approx(float(error), rel=1e-5)
    down, up = (soft.codes(torch.full_like(weight, sign)) for sign in (-1.0, 1.0))
    assert bool(
        ((result.codes[0] == down) | (result.codes[0] == up) | ~torch.tensor(result.kept)).all()
    )


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(OPERANDS), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_never_worse_than_round_to_nearest(text: str, samples: int, held: int, seed: int) -> None:
    weight = normal(4, 20, seed=seed)
    inputs = [normal(count, 3, 20, seed=seed + count) for count in (samples, 10 + held)]
    data = [Data(x, x @ weight.T) for x in inputs]
    soft = soften(weight, text)
    result = round_unit(linear, [soft], *data, RoundOptions(iterations=15, batch=2))
    values = soft.values(result.codes[0])
    error, plain = (
        float((data[1].inputs @ v.T - data[1].targets).double().square().mean())
        for v in (values, soft.values(soft.nearest))
    )
    assert error <= plain * (1 + 1e-5)
    if not result.kept:
        assert torch.equal(result.codes[0], soft.nearest)


def test_what_does_not_help_is_not_kept() -> None:
    weight = normal(8, 64)
    soft = soften(weight, E2M1)
    x, y = (correlated(128, 64, seed).view(8, 16, 64) for seed in (0, 50))
    misleading = Data(x, x @ (weight + 0.2 * normal(8, 64, seed=9)).T)
    result = round_unit(linear, [soft], misleading, Data(y, y @ weight.T), FAST)
    assert not result.kept
    assert result.error >= result.nearest_error
    assert torch.equal(result.codes[0], soft.nearest)


@pytest.mark.parametrize(("of_weight", "of_inputs"), [(7, 0), (0, -9), (-12, 20)])
def test_the_size_of_weights_and_inputs_does_not_matter(of_weight: int, of_inputs: int) -> None:
    weight, options = normal(8, 64), RoundOptions(iterations=60, patience=0)
    plain = round_layer(weight, E2M1, options)
    scaled = round_layer(weight * 2.0**of_weight, E2M1, options, 2.0**of_inputs)
    assert plain.kept
    assert torch.equal(scaled.codes[0], plain.codes[0])


def test_the_seed_decides() -> None:
    weight = normal(8, 64)
    options = [RoundOptions(iterations=60, seed=seed, batch=2, patience=0) for seed in (0, 0, 1)]
    same, again, other = (round_layer(weight, E2M1, own).codes[0] for own in options)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_a_weight_on_the_grid_stays() -> None:
    soft = soften(normal(8, 64), E2M1)
    grid = soft.values(soft.nearest)
    result = round_layer(grid, E2M1)
    assert result.nearest_error == 0
    assert not result.kept
    assert torch.equal(result.codes[0], soft.nearest)


def test_it_ends_where_nothing_is_gained() -> None:
    weight = normal(4, 32)
    result = round_layer(weight, "f8E4M3FN@row:f32", RoundOptions(iterations=2000, patience=1))
    assert result.ended is Ended.PATIENCE
    assert result.iterations < 2000


def test_a_limit_of_time_makes_fewer_iterations() -> None:
    def slow(weights: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        time.sleep(0.002)
        return linear(weights, inputs)

    weight = normal(4, 32)
    data = [layer_data(weight, 8, seed) for seed in (0, 50)]
    options = RoundOptions(iterations=100_000, seconds=0.2)
    result = round_unit(slow, [soften(weight, E2M1)], *data, options)
    assert result.ended is Ended.TIME
    assert 20 <= result.iterations <= 150


def test_learning_leaves_no_gradient_on_the_callers_tensors() -> None:
    weight = normal(4, 32).requires_grad_()
    x = correlated(64, 32).view(4, 16, 32)
    data = Data(x, (x @ weight.T).detach())
    round_unit(linear, [soften(weight, E2M1)], data, data, RoundOptions(iterations=5))
    assert weight.grad is None


def test_nothing_to_learn_from_names_the_layer() -> None:
    data = layer_data(normal(4, 32), 2, 0)
    empty = Data(data.inputs[:0], data.targets[:0])
    with pytest.raises(NumericsError, match=r"^layer 'blocks\.0': .* not 1, 0 and 2"):
        round_unit(linear, [soften(normal(4, 32), E2M1)], empty, data, layer="blocks.0")


def test_a_target_of_another_shape_names_the_layer() -> None:
    data = layer_data(normal(4, 32), 2, 0)
    wrong = Data(data.inputs, data.targets[..., :1])
    with pytest.raises(NumericsError, match=r"^layer 'fc1': its output \[2, 16, 4\]"):
        round_unit(linear, [soften(normal(4, 32), E2M1)], wrong, wrong, layer="fc1")


def test_a_target_that_is_no_number_names_the_layer() -> None:
    data = layer_data(normal(4, 32), 2, 0)
    wrong = Data(data.inputs, data.targets * torch.nan)
    with pytest.raises(NumericsError, match=r"^layer 'fc1': its output or the target holds NaN"):
        round_unit(linear, [soften(normal(4, 32), E2M1)], wrong, wrong, layer="fc1")


@pytest.mark.parametrize(
    ("name", "value"),
    [("iterations", 0), ("batch", 0), ("patience", -1), ("learning_rate", 0.0),
     ("regularizer", float("inf")), ("seconds", 0.0)],
)  # fmt: skip
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^{name} "):
        RoundOptions(**{name: value})  # type: ignore[arg-type]
