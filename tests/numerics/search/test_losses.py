"""The two ways to the loss of a candidate, against fp64."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.formats import parse_format
from fpcompiler.numerics.search.losses import DirectLosses, GramLosses, pair_losses, row_losses
from fpcompiler.numerics.search.problem import Choice, Problem
from tests.models import normal

SPEC = parse_format("e2m1")


def problem(tokens: int = 500, *, outliers: bool = True, max_bytes: int = 1 << 20) -> Problem:
    x, w = normal(tokens, 32), normal(8, 32, seed=1)
    if outliers:
        x[:, 3] *= 1000
    return Problem.of(x, w, None, max_bytes=max_bytes, layer="")


@pytest.mark.parametrize("clip", [None, 1.0, 0.01])
@pytest.mark.parametrize("max_bytes", [1 << 20, 9000], ids=["whole", "chunks"])
def test_both_equal_fp64(max_bytes: int, clip: float | None) -> None:
    case = problem(max_bytes=max_bytes)
    activation = None if clip is None else case.activation_choice(SPEC, clip)
    scales = [case.weight_choice(SPEC, gamma).scale for gamma in (1.0, 0.7, 0.3)]
    x = case.x * case.x_unit
    xq = case.round_inputs(x, activation).double()
    expected = []
    for scale in scales:
        wq = case.round_weight(Choice(SPEC, scale)).double()
        expected.append((xq @ wq.T - x.double() @ case.weight.double().T).square().sum(0))
    for losses in (GramLosses(case, activation), DirectLosses(case, activation, None)):
        # One channel is a thousand times the others: sums of fp32 squares of both are off by
        # 32 * 2**-24 of the larger one's, 2e-6.
        torch.testing.assert_close(losses(SPEC, scales), torch.stack(expected), rtol=1e-4, atol=0)
        assert losses.tokens == 500


def test_a_weight_that_is_already_on_the_grid_costs_nothing() -> None:
    x = normal(100, 8)
    w = torch.tensor([[6.0, -4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0]])
    case = Problem.of(x, w, None, max_bytes=1 << 20, layer="")
    assert GramLosses(case, None)(SPEC, [torch.ones(1, 1)]).item() == 0.0


def test_the_cheaper_way_that_fits_is_taken() -> None:
    assert isinstance(row_losses(problem(33), None, None), GramLosses)
    assert isinstance(row_losses(problem(32), None, None), DirectLosses)
    assert isinstance(
        row_losses(problem(500, max_bytes=16 * 32 * 32 - 1), None, None), DirectLosses
    )
    x, w = normal(500, 32), normal(8, 32)
    weighted = Problem.of(x, w, torch.ones(500, 8), max_bytes=1 << 20, layer="")
    losses = row_losses(weighted, None, weighted.sample(50))
    assert isinstance(losses, DirectLosses)
    assert losses.tokens == 50


def test_a_sample_has_small_and_large_tokens() -> None:
    x = torch.tensor([3.0, 0.0, -9.0, 1.0, 5.0, 3.0])[:, None]
    case = Problem.of(x, torch.ones(1, 1), None, max_bytes=1, layer="")
    assert case.sample(6) is case.sample(7) is None
    # In order of magnitude: 2, 4, 0, 5, 3, 1, of which every second is taken.
    assert case.sample(3).tolist() == [0, 2, 3]
    assert case.sample(1).tolist() == [2]


def test_losses_of_some_tokens() -> None:
    case, index = problem(max_bytes=9000), torch.tensor([1, 5, 400])
    part = Problem.of(case.x[index], case.weight, None, max_bytes=1 << 20, layer="")
    rounded = case.round_weight(case.weight_choice(SPEC, 1.0))
    some = pair_losses(case, [None], [rounded], index) / case.x_unit**2
    own = pair_losses(part, [None], [rounded * part.weight_unit])
    own = own / (part.x_unit * part.weight_unit) ** 2
    torch.testing.assert_close(some, own, rtol=1e-5, atol=0)
