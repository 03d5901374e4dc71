"""GPTQ with few tokens: the damping, and the check on tokens held out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics.gptq import MOST_DAMPING, factorize
from fpcompiler.numerics.held_out import are_few, held_out_error, hold_out, shrinkage_damping
from fpcompiler.operand import Operand
from tests.models import normal

OPERAND = Operand.parse("f4E2M1FN@row:f32")


def gram(x: Tensor) -> Tensor:
    return x.T @ x


def correlated(tokens: int, k: int, directions: int, seed: int = 0) -> Tensor:
    """Return tokens that lie near a few directions, as those of a trained model do."""
    mixing = normal(directions, k, seed=100)
    return normal(tokens, directions, seed=seed) @ mixing + 0.01 * normal(tokens, k, seed=seed + 1)


def test_few_is_less_than_four_tokens_for_each_input() -> None:
    assert are_few(255, 64)
    assert not are_few(256, 64)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 60), st.integers(2, 24), st.integers(0, 1000))
def test_the_damping_is_the_shrinkage_of_oas(tokens: int, k: int, seed: int) -> None:
    x = normal(tokens, k, seed=seed).double() * torch.arange(1, k + 1)
    s = gram(x) / tokens
    trace, squares = s.trace(), (s @ s).trace()
    # Chen et al., arXiv 0907.4698, equation 23
    part = ((1 - 2 / k) * squares + trace**2) / ((tokens + 1 - 2 / k) * (squares - trace**2 / k))
    part = part.clamp(max=1)
    expected = min(float(part / (1 - part)), MOST_DAMPING) if part < 1 else MOST_DAMPING
    assert shrinkage_damping(gram(x).float(), tokens) == pytest.approx(expected, rel=1e-4)


def test_an_input_that_is_always_zero_does_not_change_the_damping() -> None:
    x = correlated(20, 16, 3)
    wider = torch.nn.functional.pad(x, (0, 5))
    assert shrinkage_damping(gram(wider), 20) == pytest.approx(shrinkage_damping(gram(x), 20))


@pytest.mark.parametrize("matrix", [torch.zeros(4, 4), torch.eye(4), torch.eye(1)])
def test_nothing_is_added_where_nothing_is_left_to_shrink(matrix: Tensor) -> None:
    assert shrinkage_damping(matrix, 3) == 0


def test_the_damping_falls_with_the_number_of_tokens() -> None:
    dampings = [shrinkage_damping(gram(correlated(n, 64, 8)), n) for n in (10, 40, 160, 6400)]
    assert dampings == sorted(dampings, reverse=True)
    assert dampings[-1] < 0.01 < dampings[1]


def test_what_is_held_out_is_not_learned_from() -> None:
    x = correlated(30, 16, 4)
    held = hold_out(gram(x), x[10:], damping=0.1)  # a sample of 20, of which 5 are held out
    torch.testing.assert_close(held.hessian, gram(x[25:].double()))
    wanted = factorize(gram(x[:25]).double(), damping=0.1)
    assert torch.equal(held.factor.order, wanted.order)
    # The sum over all tokens is in fp32, where it has rounded by 1e-7 of its entries.
    torch.testing.assert_close(held.factor.upper, wanted.upper, rtol=1e-4, atol=1e-5)


def test_an_input_seen_only_in_what_is_held_out_gives_no_noise_to_learn() -> None:
    x = correlated(40, 16, 4)
    x[:, 3] = 0
    x[-1, 3] = 1e4
    held = hold_out(gram(x), x)
    assert float(held.factor.hessian[3].abs().sum()) == 0


def test_gptq_helps_where_tokens_share_directions() -> None:
    x, weight = correlated(48, 64, 8), normal(32, 64, seed=5)
    held = hold_out(gram(x), x, damping=0.01)
    assert held_out_error(weight, held, OPERAND) < 0.3


def test_gptq_does_not_help_where_all_directions_are_new() -> None:
    x, weight = normal(48, 64, seed=3), normal(32, 64, seed=5)
    held = hold_out(gram(x), x, damping=0.01)
    assert held_out_error(weight, held, OPERAND) > 1


@pytest.mark.parametrize("tokens", [0, 1])
def test_without_a_token_to_learn_from_nothing_is_gained(tokens: int) -> None:
    x = normal(1, 16)[:tokens]
    held = hold_out(gram(x), x)
    assert held_out_error(normal(4, 16, seed=2), held, OPERAND) == 1


def test_a_sample_of_another_length_names_the_layer() -> None:
    with pytest.raises(NumericsError, match=r"^layer 'up': a sample \[3, 8\] and a Hessian \[4, 4"):
        hold_out(torch.eye(4), normal(3, 8), layer="up")
