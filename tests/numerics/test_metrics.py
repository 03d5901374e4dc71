"""Metrics on worked numbers and at their limits."""

from __future__ import annotations

import math

import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import cosine, max_error, sqnr_db


def test_worked_numbers() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])
    assert sqnr_db(a, b) == pytest.approx(20.0)
    assert cosine(a, b) == pytest.approx(27 / (5 * math.hypot(3, 4.5)))
    assert max_error(a, b) == 0.5
    assert cosine(a, -a) == pytest.approx(-1.0)


def test_equal_tensors() -> None:
    infinite = torch.tensor([math.inf, -math.inf, 0.0])
    for x in (torch.zeros(3), torch.ones(2, 2), torch.empty(0), infinite):
        assert sqnr_db(x, x) == math.inf
        assert max_error(x, x) == 0.0
    assert cosine(torch.ones(5), torch.ones(5)) == pytest.approx(1.0)


def test_zero_tensors() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr_db(zero, one) == -math.inf
    assert sqnr_db(one, zero) == 0.0
    assert (cosine(zero, zero), cosine(zero, one), cosine(torch.empty(0), torch.empty(0))) == (
        1,
        0,
        1,
    )


def test_values_that_are_not_numbers() -> None:
    one, nan, inf = torch.ones(1), torch.full((1,), math.nan), torch.full((1,), math.inf)
    assert math.isnan(sqnr_db(one, nan))
    assert math.isnan(cosine(one, nan))
    assert math.isnan(max_error(torch.cat([one, one]), torch.cat([nan, one])))
    assert sqnr_db(one, inf) == -math.inf
    assert max_error(one, inf) == math.inf


def test_sums_are_in_fp64_over_all_chunks() -> None:
    x = torch.full((600_001,), 1.0)
    y = x.clone()
    y[-1] += 2.0**-10
    assert sqnr_db(x, y) == pytest.approx(10 * math.log10(600_001 * 2.0**20))
    assert max_error(x, y) == 2.0**-10


def test_any_dtype() -> None:
    a = torch.tensor([1, 2, 3])
    assert max_error(a, a.to(torch.bfloat16)) == 0.0
    assert sqnr_db(a > 1, a > 1) == math.inf


def test_shapes_that_differ_are_refused() -> None:
    for metric in (sqnr_db, cosine, max_error):
        with pytest.raises(NumericsError, match=r"shapes \[2\] and \[2, 1\]"):
            metric(torch.ones(2), torch.ones(2, 1))
