"""The rectified sigmoid, the regularizer and its schedule against numbers and autograd."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.numerics.adaround.rectified import (
    beta_at,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rectified_slope,
    undecided,
    undecided_slope,
)


def test_the_inverse_is_one() -> None:
    h = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)


def test_far_out_it_is_exactly_0_and_1() -> None:
    assert rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]
    assert rectified_sigmoid(torch.zeros(())).item() == pytest.approx(0.5)


@pytest.mark.parametrize(("beta", "wanted"), [(20.0, 0.9999999890), (2.0, 0.84)])
def test_the_regularizer(beta: float, wanted: float) -> None:
    h = torch.tensor(0.3, dtype=torch.float64)
    assert float(undecided(h, beta)) == pytest.approx(wanted, abs=5e-11)


def test_the_schedule() -> None:
    assert beta_at(499 / 2500) is None
    found = [beta_at(step / 2500) for step in (500, 1500, 2500)]
    assert found == pytest.approx([20.0, 11.0, 2.0])


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_slopes_are_those_of_autograd(beta: float) -> None:
    alpha = torch.linspace(-4, 4, 161, dtype=torch.float64, requires_grad=True)
    h = rectified_sigmoid(alpha)
    (slope,) = torch.autograd.grad(h.sum(), alpha)
    torch.testing.assert_close(rectified_slope(alpha.detach()), slope)
    h = h.detach().requires_grad_()
    (slope,) = torch.autograd.grad(undecided(h, beta).sum(), h)
    torch.testing.assert_close(undecided_slope(h.detach(), beta), slope)
