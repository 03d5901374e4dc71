"""SmoothQuant factors: the formula, shared inputs, exact folding, and channels of zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError
from fpcompiler.numerics.smooth import smooth_scales
from tests.models import normal


def test_the_formula() -> None:
    amax = torch.tensor([16.0, 1.0, 4.0, 0.0, 2.0])
    weights = [
        torch.tensor([[1.0, -2.0, 0.5, 1.0, 0.0], [0.5, 0.0, 0.25, 1.0, 0.0]]),
        torch.tensor([[-4.0, 1.0, 0.125, 1.0, 0.0]]),
    ]
    assert smooth_scales(amax, weights).tolist() == pytest.approx([2, 0.5**0.5, 8**0.5, 1, 1])
    assert smooth_scales(amax, weights, alpha=1.0).tolist() == pytest.approx([16, 1, 4, 1, 1])
    assert smooth_scales(amax, weights, alpha=0.0).tolist() == pytest.approx([0.25, 0.5, 2, 1, 1])
    powers = smooth_scales(amax, weights, power_of_two=True)
    # 2**-0.5 and 2**1.5 lie in the middle; round to even takes 2**0 and 2**2.
    assert powers.tolist() == [2, 1, 4, 1, 1]


def test_at_one_half_both_sides_get_the_same_range() -> None:
    x, weights = normal(50, 24) * torch.arange(1.0, 25.0), [normal(8, 24), normal(4, 24, seed=1)]
    factors = smooth_scales(x.abs().amax(0), weights)
    top = torch.cat(weights).abs().amax(0) * factors
    torch.testing.assert_close((x / factors).abs().amax(0), top)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=20),
    st.integers(0, 99),
    st.floats(0, 1),
)
def test_powers_of_two_are_exact_and_nearest(maxima: list[float], seed: int, alpha: float) -> None:
    amax, weight = torch.tensor(maxima), normal(3, len(maxima), seed=seed)
    powers = smooth_scales(amax, [weight], alpha=alpha, power_of_two=True)
    factors = smooth_scales(amax, [weight], alpha=alpha)
    assert bool((powers.frexp().mantissa == 0.5).all())
    assert torch.equal(weight * powers / powers, weight)
    ratio = (powers.double() / factors.double()).log2().abs()
    assert bool((ratio <= 0.5 + 1e-6).all())


def test_factors_and_their_inverses_are_normal_numbers() -> None:
    amax, weight = torch.tensor([3e38, 1e-45]), torch.tensor([[1e-45, 3e38]])
    for power_of_two in (False, True):
        factors = smooth_scales(amax, [weight], alpha=0.9, power_of_two=power_of_two)
        assert bool((factors >= 2.0**-126).all())
        assert bool((1 / factors >= 2.0**-126).all())


@pytest.mark.parametrize(
    ("amax", "weights", "alpha", "message"),
    [
        (torch.ones(4), [], 0.5, r"maxima \[4\] and weights \[\] do not fit"),
        (torch.ones(4), [torch.ones(2, 3)], 0.5, r"weights \[\[2, 3\]\] do not fit"),
        (torch.ones(4), [torch.ones(0, 4)], 0.5, r"weights \[\[0, 4\]\] do not fit"),
        (torch.ones(1, 4), [torch.ones(2, 4)], 0.5, r"maxima \[1, 4\]"),
        (torch.ones(4), [torch.ones(2, 4)], 1.5, "alpha must be from 0 to 1, not 1.5"),
        (torch.full((4,), torch.nan), [torch.ones(2, 4)], 0.5, "NaN/Inf or negative numbers"),
        (torch.ones(4), [torch.full((2, 4), torch.inf)], 0.5, "NaN/Inf or negative numbers"),
        (-torch.ones(4), [torch.ones(2, 4)], 0.5, "NaN/Inf or negative numbers"),
    ],
)
def test_refusals(
    amax: torch.Tensor, weights: list[torch.Tensor], alpha: float, message: str
) -> None:
    with pytest.raises(NumericsError, match=f"layer 'fc': .*{message}"):
        smooth_scales(amax, weights, alpha=alpha, layer="fc")
