"""The benchmark that compares learned rounding with the published loop measures what it says."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from examples.benchmarks import adaround_speed
from fpcompiler.numerics import quantize
from fpcompiler.numerics.adaround import Parametrization, SoftWeight
from fpcompiler.operand import Operand
from tests.models import normal

SMALL = Namespace(
    width=128, hidden=128, heads=2, tokens=8, images=6, held_out=2, iterations=6, batch=2,
    loop_batch=16, limit=1e9,
)  # fmt: skip


@pytest.mark.parametrize(("limit", "made"), [(1e9, 6), (1e-9, 1)])
def test_a_small_block(limit: float, made: int) -> None:
    options = Namespace(**{**vars(SMALL), "limit": limit})
    report = adaround_speed.measure(options, torch.device("cpu"))
    assert report["loop_iterations_made"] == made
    assert report["loop_images_in_a_step"] == 6
    assert report["times_faster"] == report["loop_seconds"] / report["own_seconds"]
    assert report["own_iterations"] == 6
    assert 0 < report["own_loss"] <= report["round_to_nearest_loss"] * (1 + 1e-5)


def test_the_loop_starts_where_numerics_does() -> None:
    weight = normal(8, 256)
    operand = Operand.parse(adaround_speed.OPERAND)
    soft = SoftWeight.of(
        weight, quantize(weight, operand)[1], operand, parametrization=Parametrization.SCALE_AWARE
    )
    loop = adaround_speed.PublishedLoop(adaround_speed.Block(2), [weight])
    (learned,), (_, step, largest) = loop.start(), loop.parts[0]
    inside = (loop.parts[0][0].abs() < largest * (1 - 1e-6)).flatten(1)
    alpha = (learned / step).flatten(1).detach()
    torch.testing.assert_close(
        alpha[inside], soft.alpha(soft.initial())[inside], rtol=1e-4, atol=1e-4
    )
    low = loop.soft(0, torch.zeros_like(step))
    torch.testing.assert_close(low[inside], soft.low[inside])
