"""Pre-shifted biases: the worked numbers of LLM-FP4, exact shifts and folds, and the search."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec, parse_format
from fpcompiler.numerics import decode, dequantize, quantize, round_to
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.preshift import (
    PreShift,
    ShiftRounding,
    channel_bias,
    fold,
    preshift,
)
from fpcompiler.operand import Operand
from tests.models import normal

E2M1 = parse_format("e2m1")
MAXIMA = torch.tensor([8.0, 3.0, 0.9, 0.1])
X = torch.tensor([7.1, -2.2, 0.8, 0.09])
W = torch.tensor([[0.5, -1.5, 3.0, 2.0], [1.0, 4.0, -6.0, 0.5]])

fast = settings(deadline=None, max_examples=60)
element_formats = st.sampled_from([spec for spec in FORMATS.values() if spec.signed])
sizes = st.floats(2.0**-60, 2.0**60, width=32)


def uneven(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Channels whose ranges differ by powers of two up to 2**6."""
    exponents = torch.randint(-6, 1, (k,), generator=torch.Generator().manual_seed(seed))
    return normal(tokens, k, seed=seed) * exact_power(exponents)


def test_powers_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    assert exact_power(exponents).tolist() == [2.0**e for e in range(-126, 128)]


@pytest.mark.parametrize("rounding", ShiftRounding)
def test_worked_numbers_of_the_paper(rounding: ShiftRounding) -> None:
    biases = channel_bias(MAXIMA, E2M1)
    assert biases.tolist() == pytest.approx([0.584963, 2, 3.736966, 6.906891], abs=1e-6)
    shift = preshift(MAXIMA, E2M1, rounding=rounding)
    assert shift.rho == pytest.approx(0.584963, abs=1e-6)
    assert shift.exponents.tolist() == [0, 1, 3, 3]
    clips = shift.qmax * exact_power(-shift.exponents)
    assert clips.tolist() == [8, 4, 1, 1]
    # On the grid with bias 0, numbers are twice those of the OCP format.
    assert (shift.unscaled(X) * 2).tolist() == [12, -6, 8, 1]
    value = shift.quantize(X)
    assert value.tolist() == pytest.approx([8, -2, 0.666667, 0.083333], abs=1e-6)
    assert (W @ value).tolist() == pytest.approx([9.166667, -3.958333], abs=1e-6)


def test_worked_fold_of_the_paper() -> None:
    shift = preshift(MAXIMA, E2M1)
    folded = fold(W, shift.exponents)
    assert folded.tolist() == [[0.5, -0.75, 0.375, 0.25], [1.0, 2.0, -0.75, 0.0625]]
    assert torch.equal(folded, round_to(folded, parse_format("e3m2")))
    assert not torch.equal(folded, round_to(folded, E2M1))
    unshifted = shift.unscaled(X) * shift.scale
    torch.testing.assert_close(folded @ unshifted, W @ shift.quantize(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", [s for s in FORMATS.values() if s.signed], ids=str)
def test_the_bias_is_that_of_equation_7(spec: FloatSpec) -> None:
    bias = float(channel_bias(torch.tensor([5.2]), spec)[0])
    largest = spec.max * 2.0**spec.bias
    assert largest * 2.0**-bias == pytest.approx(5.2)
    if all(map(math.isfinite, spec.values)):
        e, m = spec.exponent_bits, spec.mantissa_bits
        wanted = 2**e - math.log2(5.2) + math.log2(2 - 2.0**-m) - 1
        assert bias == pytest.approx(wanted, abs=1e-6)
    assert preshift(torch.tensor([5.2]), spec).rho == pytest.approx(bias)
    assert channel_bias(torch.zeros(1), spec).tolist() == [math.inf]


def test_the_roundings_differ_as_they_should() -> None:
    # b is 0.585, 2.185 and 2.985, and rho 0.585, which the released code rounds to 1.
    maxima = 8.0 * torch.exp2(-torch.tensor([0.0, 1.6, 2.4]))
    found = {
        rounding: preshift(maxima, E2M1, rounding=rounding).exponents.tolist()
        for rounding in ShiftRounding
    }
    assert found == {
        ShiftRounding.FLOOR: [0, 1, 2],
        ShiftRounding.ROUND: [0, 2, 2],
        ShiftRounding.CODE: [0, 1, 2],
    }
    # rho is 0.415 and b is 1.515: the difference of 1.1 becomes round(1.515) - round(0.415) = 2.
    maxima = torch.tensor([9.0, 9.0 * 2.0**-1.1])
    assert preshift(maxima, E2M1).exponents.tolist() == [0, 1]
    assert preshift(maxima, E2M1, rounding=ShiftRounding.CODE).exponents.tolist() == [0, 2]


@fast
@given(element_formats, st.lists(sizes, min_size=1, max_size=20), st.sampled_from(ShiftRounding))
def test_what_each_rounding_may_clip(
    spec: FloatSpec, maxima: list[float], rounding: ShiftRounding
) -> None:
    amax = torch.tensor(maxima)
    shift = preshift(amax, spec, rounding=rounding)
    assert shift.qmax == max(maxima)
    exceeded = shift.shifted(amax).double() / shift.qmax
    most = {ShiftRounding.FLOOR: 1.0, ShiftRounding.ROUND: math.sqrt(2), ShiftRounding.CODE: 2.0}
    assert float(exceeded.max()) <= most[rounding] * (1 + 1e-9)
    limit = 2**spec.exponent_bits - 1
    assert 0 <= int(shift.exponents.min()) <= int(shift.exponents.max()) <= limit
    if rounding is ShiftRounding.FLOOR:
        free = shift.exponents < limit
        assert bool((exceeded[free] > 0.5).all())


@fast
@given(st.integers(0, 99), st.integers(-30, 30), st.floats(0.5, 1), st.integers(0, 3))
def test_shifts_are_equivariant_under_powers_of_two(
    seed: int, power: int, gamma: float, limit: int
) -> None:
    x = uneven(5, 9, seed)
    amax = x.abs().amax(0)
    one = preshift(amax, E2M1, gamma=gamma, limit=limit)
    two = preshift(amax * 2.0**power, E2M1, gamma=gamma, limit=limit)
    assert torch.equal(one.exponents, two.exponents)
    assert torch.equal(one.quantize(x) * 2.0**power, two.quantize(x * 2.0**power))


@fast
@given(element_formats, st.integers(0, 99), st.floats(0.3, 1), st.sampled_from(ShiftRounding))
def test_shift_quantize_unshift_equals_one_bias_for_each_channel(
    spec: FloatSpec, seed: int, gamma: float, rounding: ShiftRounding
) -> None:
    x = uneven(6, 12, seed)
    shift = preshift(x.abs().amax(0), spec, gamma=gamma, rounding=rounding)
    for j, k in enumerate(shift.exponents.tolist()):
        scale = torch.tensor(shift.scale * 2.0**-k)
        wanted = round_to(x[:, j] / scale, spec) * scale
        assert torch.equal(shift.quantize(x)[:, j], wanted)


def test_without_shifts_it_is_quantization_per_tensor() -> None:
    x = uneven(40, 30)
    shift = preshift(x.abs().amax(0), E2M1, limit=0)
    assert not shift.exponents.any()
    operand = Operand.parse("f4E2M1FN@tensor:f32")
    assert torch.equal(shift.quantize(x), dequantize(*quantize(x, operand), operand))


def test_rho_gamma_and_limit() -> None:
    assert preshift(MAXIMA, E2M1, gamma=0.5).qmax == 4
    scale = preshift(MAXIMA, E2M1, gamma=0.7).scale
    assert scale == float(torch.tensor(8 * 0.7 / 6))
    assert preshift(MAXIMA, E2M1, gamma=0.5).exponents.tolist() == [0, 0, 2, 3]
    given_rho = preshift(MAXIMA, E2M1, rho=1.584962500721156)
    assert given_rho.qmax == pytest.approx(4)
    assert given_rho.rho == pytest.approx(1.584963, abs=1e-6)
    assert preshift(MAXIMA, E2M1, limit=1).exponents.tolist() == [0, 1, 1, 1]
    assert preshift(MAXIMA, E2M1, limit=9).exponents.tolist() == [0, 1, 3, 6]


def test_channels_of_zeros_are_not_shifted() -> None:
    for rounding in ShiftRounding:
        shift = preshift(torch.tensor([0.0, 4.0, 1.0]), E2M1, rounding=rounding)
        assert shift.exponents.tolist() == [0, 0, 2]
        nothing = preshift(torch.zeros(3), E2M1, rounding=rounding)
        assert (nothing.scale, nothing.exponents.tolist()) == (1.0, [0, 0, 0])
    tiny = preshift(torch.tensor([1e-40, 1e-45]), E2M1)
    assert tiny.scale == 2.0**-95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fold_is_undone_exactly(dtype: torch.dtype) -> None:
    exponents = torch.tensor([0, 1, 5, 7], dtype=torch.int32)
    codes = torch.arange(16, dtype=torch.uint8).view(4, 4)
    weight = decode(codes, E2M1).to(dtype)
    folded = fold(weight, exponents)
    assert folded.dtype is dtype
    assert torch.equal(folded.double(), weight.double() * 2.0 ** -exponents.double())


def test_a_fold_that_would_round_is_refused() -> None:
    exponents = torch.tensor([20], dtype=torch.int32)
    assert fold(torch.ones(1, 1, dtype=torch.float16), exponents).item() == 2.0**-20
    with pytest.raises(NumericsError, match=r"layer 'fc': weights times 2\*\*-20 .* torch.float16"):
        fold(torch.full((1, 1), 1.125, dtype=torch.float16) / 64, exponents, layer="fc")
    with pytest.raises(NumericsError, match=r"a weight \[1, 1\] needs as many exponents"):
        fold(torch.ones(1, 1), torch.zeros(2, dtype=torch.int32))


def output_error(x: Tensor, weights: list[Tensor], shift: PreShift) -> float:
    difference = shift.quantize(x).double() - x.double()
    return sum(float((difference @ w.double().T).square().sum()) for w in weights)


def test_shifts_help_uneven_channels() -> None:
    x, weights = uneven(300, 64), [normal(64, 64)]
    amax = x.abs().amax(0)
    unshifted = output_error(x, weights, preshift(amax, E2M1, limit=0))
    assert output_error(x, weights, preshift(amax, E2M1)) < 0.5 * unshifted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amax": torch.zeros(2, 2)}, r"the maxima of channels \[2, 2\] must be finite"),
        ({"amax": torch.tensor([torch.nan])}, "must be finite numbers"),
        ({"amax": torch.tensor([-1.0])}, "of at least 0"),
        ({"gamma": 0.0}, "gamma 0.0 must be positive"),
        ({"limit": 32}, "the limit 32 of the exponents 0 to 31"),
        ({"rho": math.nan}, "a bias rho of nan"),
        ({"rho": 500.0}, "a bias rho of 500.0 makes a scale that fp32 cannot hold"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(NumericsError, match=f"layer 'fc': .*{message}"):
        preshift(**{"amax": MAXIMA, "spec": E2M1, "layer": "fc", **change})
