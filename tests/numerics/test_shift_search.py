"""The search for pre-shifted biases: what it chooses, and that it loses to nothing simpler."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec, parse_format
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.preshift import PreShift, ShiftRounding, preshift
from fpcompiler.numerics.shift_search import (
    GAMMAS,
    channel_ranges,
    search_powers,
    search_rho,
)
from fpcompiler.operand import Operand
from tests.models import normal

E2M1 = parse_format("e2m1")
SAME_BITS = [parse_format(name) for name in ("e2m1", "e1m2", "e3m0")]
element_formats = st.sampled_from([spec for spec in FORMATS.values() if spec.signed])


def uneven(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Channels whose ranges differ by powers of two up to 2**6."""
    exponents = torch.randint(-6, 1, (k,), generator=torch.Generator().manual_seed(seed))
    return normal(tokens, k, seed=seed) * exact_power(exponents)


def output_error(x: Tensor, weights: list[Tensor], shift: PreShift) -> float:
    difference = shift.quantize(x).double() - x.double()
    return sum(float((difference @ w.double().T).square().sum()) for w in weights)


@pytest.mark.parametrize("rows", [[3], [40, 5]], ids=["few rows", "gram matrix"])
@pytest.mark.parametrize("rounding", ShiftRounding)
def test_the_search_finds_the_least_error(rows: list[int], rounding: ShiftRounding) -> None:
    x = uneven(250, 24)  # few enough to be compared on all tokens at once
    weights = [normal(n, 24, seed=n) for n in rows]
    amax = x.abs().amax(0)
    shifts = [
        preshift(amax, spec, gamma=gamma, rounding=rounding, limit=limit)
        for spec, gamma, limit in itertools.product(SAME_BITS, GAMMAS, (0, 5))
    ]
    found = search_rho(x, weights, SAME_BITS, rounding=rounding, limit=5)
    least = min(output_error(x, weights, shift) for shift in shifts)
    assert output_error(x, weights, found) <= least * (1 + 1e-4)
    assert least < 0.9 * output_error(x, weights, shifts[0])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 40), element_formats, st.integers(-20, 20))
def test_the_search_never_loses_to_no_clip_and_follows_the_unit(
    seed: int, rows: int, spec: FloatSpec, power: int
) -> None:
    x, weights = uneven(30, 16, seed), [normal(rows, 16, seed=seed + 1)]
    found = search_rho(x, weights, [spec])
    amax = x.abs().amax(0)
    for limit in (0, None):
        plain = output_error(x, weights, preshift(amax, spec, limit=limit))
        # Candidates are compared in fp32: a sum of 16 products, squared.
        assert output_error(x, weights, found) <= plain * (1 + 1e-4)
    moved = search_rho(x * 2.0**power, weights, [spec])
    assert moved.qmax == found.qmax * 2.0**power
    assert torch.equal(moved.exponents, found.exponents)


def test_the_search_adds_the_errors_of_all_weights() -> None:
    # Channel 0 lies on the grid of Qmax 6, channel 1 on that of Qmax 4.5.
    x = torch.tensor([[6.0, 4.5], [4.0, 3.0], [3.0, 2.25], [2.0, 1.5]])
    first, second = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    for weights, qmax in (
        ([first], 6),
        ([second], 4.5),
        ([first, second], 6),
        ([second, first], 6),
        ([first, second * 9], 4.5),
        ([first[:1], second[:1] * 9], 4.5),
    ):
        assert search_rho(x, weights, [E2M1], gammas=[1.0, 0.75]).qmax == qmax


def test_the_search_is_the_same_for_any_length_of_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = uneven(100, 16), [normal(20, 16)]
    whole = search_rho(x, weights, [E2M1])
    monkeypatch.setattr("fpcompiler.numerics.scratch._CPU_CHUNK", 16 * 7)
    assert search_rho(x, weights, [E2M1]).qmax == whole.qmax


def test_a_search_on_part_of_the_tokens_ends_on_all_of_them() -> None:
    """The token that would be clipped is not among those that are looked at first."""
    x = uneven(1000, 16)
    x[3] *= 100
    weights = [normal(20, 16)]
    found = search_rho(x, weights, [E2M1])
    assert output_error(x, weights, found) <= output_error(
        x, weights, preshift(x.abs().amax(0), E2M1, limit=0)
    )


def test_a_format_is_chosen() -> None:
    grid = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, -5])  # E1M2 holds these, E2M1 has no 5 and 7
    x = torch.stack([grid.roll(i) for i in range(8)])
    assert search_rho(x, [torch.eye(8)], SAME_BITS).format == parse_format("e1m2")
    assert search_rho(x, [torch.eye(8)], SAME_BITS[::2]).format == E2M1


def test_ranges_are_in_one_unit() -> None:
    x = uneven(200, 16)
    x[:, 5] = 0
    amax = x.abs().amax(0)
    ranges = channel_ranges(amax, x.T @ x, 200)
    assert torch.equal(ranges[0], amax)
    assert all(float(own.amax()) == pytest.approx(float(amax.amax())) for own in ranges)
    assert all(float(own[5]) == 0 for own in ranges)
    rms = x.square().mean(0).sqrt()
    torch.testing.assert_close(ranges[2] / ranges[2].amax(), rms / rms.amax())


def dynamic_error(x: Tensor, weight: Tensor, operand: Operand, exponents: Tensor) -> float:
    power = exact_power(exponents)
    value = dequantize(*quantize(x * power, operand), operand) / power
    return float(((value - x).double() @ weight.double().T).square().sum())


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.sampled_from(["e2m1@token:f32", "f6E2M3FN@token:f32"]))
def test_powers_for_tokens_never_lose_to_none(seed: int, text: str) -> None:
    x, weight, operand = uneven(60, 32, seed), normal(40, 32, seed=seed + 1), Operand.parse(text)
    found = search_powers(x, [weight], operand, limit=11)
    assert int(found.min()) >= 0
    assert int(found.max()) <= 11
    plain = dynamic_error(x, weight, operand, torch.zeros(32, dtype=torch.int32))
    assert dynamic_error(x, weight, operand, found) <= plain * (1 + 1e-4)


def test_powers_help_uneven_channels_and_leave_even_ones() -> None:
    operand = Operand.parse("e2m1@token:f32")
    weight, none = torch.eye(32), torch.zeros(32, dtype=torch.int32)
    x = uneven(300, 32)
    found = search_powers(x, [weight / x.abs().amax(0)], operand, limit=11)
    scaled = weight / x.abs().amax(0)
    assert dynamic_error(x, scaled, operand, found) < 0.2 * dynamic_error(x, scaled, operand, none)
    even = torch.ones(10, 32)
    assert torch.equal(search_powers(even, [weight], operand, limit=11), none)


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (torch.zeros(0, 4), [torch.ones(2, 4)]),
        (torch.ones(4), [torch.ones(2, 4)]),
        (torch.ones(3, 4), []),
        (torch.ones(3, 4), [torch.ones(2, 5)]),
    ],
)
def test_refusals(x: Tensor, weights: list[Tensor]) -> None:
    operand = Operand.parse("e2m1@token:f32")
    with pytest.raises(NumericsError, match=r"layer 'fc': inputs .* do not fit"):
        search_rho(x, weights, [E2M1], layer="fc")
    with pytest.raises(NumericsError, match=r"layer 'fc': inputs .* do not fit"):
        search_powers(x, weights, operand, limit=3, layer="fc")


@pytest.mark.parametrize(("specs", "gammas"), [([], [1.0]), ([E2M1], [])])
def test_nothing_to_try(specs: list[FloatSpec], gammas: list[float]) -> None:
    with pytest.raises(NumericsError, match="layer 'fc': there is no range or no format"):
        search_rho(torch.ones(3, 4), [torch.ones(2, 4)], specs, gammas=gammas, layer="fc")
