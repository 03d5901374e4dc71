"""Learned rounding on a GPU: the same neighbours as on the CPU, and gains as large."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.numerics.adaround import RoundOptions, round_layers, round_unit
from tests.models import normal
from tests.numerics.adaround.problems import Data, correlated, mlp, soften
from tests.numerics.adaround.test_layer import grams
from tests.numerics.adaround.test_soft import OPERANDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("text", OPERANDS)
def test_the_neighbours_are_those_of_the_cpu(text: str) -> None:
    weight = normal(16, 150)
    here, there = soften(weight, text), soften(weight.cuda(), text)
    assert torch.equal(there.nearest.cpu(), here.nearest)
    assert torch.equal(there.position.cpu(), here.position)
    assert torch.equal(there.low.cpu(), here.low)
    assert torch.equal(there.width.cpu(), here.width)
    torch.testing.assert_close(there.initial().cpu(), here.initial(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixed", [True, False])
def test_a_block_gains_clearly_and_again_the_same(mixed: bool) -> None:
    weights = [normal(96, 32, seed=1) / 32**0.5, normal(32, 96, seed=2) / 96**0.5]
    weights = [weight.cuda() for weight in weights]
    inputs = [
        correlated(count * 8, 32, seed).view(count, 8, 32).cuda()
        for count, seed in ((64, 0), (16, 50))
    ]
    data = [Data(x, mlp(weights, (x,))) for x in inputs]
    options = RoundOptions(iterations=200, batch=8, mixed_precision=mixed)
    soft = [soften(weight, "e2m1@row:f32") for weight in weights]
    result = round_unit(mlp, soft, *data, options)
    assert result.kept
    assert result.error < 0.6 * result.nearest_error
    again = round_unit(mlp, soft, *data, options)
    assert all(map(torch.equal, again.codes, result.codes))


def test_layers_gain_as_on_the_cpu() -> None:
    weight, learn, held = normal(3, 16, 96), grams(3, 96), grams(3, 96, seed=50)
    options = RoundOptions(iterations=100)
    here = round_layers(weight, soften(weight, "e2m1@row:f32"), learn, held, options)
    weight, learn, held = weight.cuda(), learn.cuda(), held.cuda()
    there = round_layers(weight, soften(weight, "e2m1@row:f32"), learn, held, options)
    assert bool(there.kept.all())
    # Sums in another order lead to other flips, of much the same error.
    torch.testing.assert_close(there.error.cpu(), here.error, rtol=0.1, atol=0)
