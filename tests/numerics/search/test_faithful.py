"""The search of LLM-FP4 with what is wrong with it: worked numbers, and a second implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.benchmarks.search_speed import Loops, make_layer
from fpcompiler.errors import OptionError
from fpcompiler.formats import parse_format
from fpcompiler.numerics import decode
from fpcompiler.numerics.search import (
    GAMMAS,
    FaithfulOptions,
    Order,
    bias_of,
    paper_formats,
    quantize_with_scale,
    search_layer,
    search_layer_faithful,
)
from fpcompiler.numerics.search.faithful import candidate_scales

FOUR = paper_formats(4)
E2M1 = parse_format("e2m1")
WEIGHT = torch.tensor([[0.9, -0.31, 0.12, 0.05]])

# Scales are rounded to fp32 and errors of 1e-2 are differences of numbers below 1, so that squared
# errors are good to 2 * 2**-24 / 1e-2 = 1.2e-5. The table has 7 digits.
CLOSE = {"rel": 2e-5}


def values(weight: Tensor, choice) -> Tensor:
    return (
        decode(quantize_with_scale(weight, choice.scale, choice.spec), choice.spec) * choice.scale
    )


def test_the_grid_has_no_candidate_without_a_clip() -> None:
    assert len(GAMMAS) == 100
    assert (GAMMAS[0], GAMMAS[-1]) == (0.01, pytest.approx(1.1881))
    assert [round(gamma, 4) for gamma in GAMMAS if 0.99 < gamma < 1.02] == [0.9977, 1.0096]


@pytest.mark.parametrize(
    ("name", "initial", "rtn", "bias", "clip", "mse", "rounded"),
    [
        ("e3m0", 7.152003, 1.830078e-3, 6.114247, 1.847728, 1.724050e-3,
         [0.923864, -0.230966, 0.115483, 0.057742]),
        ("e2m1", 3.736966, 4.062500e-4, 3.728371, 0.905378, 4.246182e-4,
         [0.905378, -0.301793, 0.150896, 0.075448]),
        ("e1m2", 1.959358, 1.341837e-3, 1.745004, 1.044166, 8.779531e-4,
         [0.894999, -0.298333, 0.149167, 0]),
    ],
)  # fmt: skip
def test_the_worked_example(name, initial, rtn, bias, clip, mse, rounded) -> None:
    spec = parse_format(name)
    assert float(bias_of(WEIGHT.abs().max(), spec)) == pytest.approx(initial, abs=1e-6)
    found = search_layer_faithful(torch.eye(4), WEIGHT, [spec])
    assert found.rtn_loss == pytest.approx(rtn, **CLOSE)
    assert found.loss == pytest.approx(mse, **CLOSE)
    assert float(found.weight_clip) == pytest.approx(clip, abs=1e-6)
    assert float(bias_of(found.weight_clip, spec)) == pytest.approx(bias, abs=1e-6)
    torch.testing.assert_close(
        values(WEIGHT, found.weight), torch.tensor([rounded]), rtol=0, atol=1e-6
    )


def test_it_can_lose_to_rounding_to_nearest_and_the_default_does_not() -> None:
    published = search_layer_faithful(torch.eye(4), WEIGHT, FOUR)
    assert published.weight.spec is E2M1
    assert published.loss > published.rtn_loss * 1.04
    ours = search_layer(torch.eye(4), WEIGHT, FOUR)
    assert ours.loss <= ours.rtn_loss < published.loss
    assert ours.weight.spec is E2M1


@pytest.mark.parametrize(
    ("largest", "low", "high"),
    [
        (0.05, 0.3567, 227.2),
        (0.5, 0.55, 23.25),
        (6, 0.8778, 1.986),
        (12, 1, 1),
        (100, 0.1226, 1.49),
    ],
)
def test_what_the_grid_covers_depends_on_the_unit(largest, low, high) -> None:
    scales = candidate_scales(torch.tensor([[float(largest)]]), E2M1)
    clips = torch.cat(scales) * E2M1.max / largest
    assert float(clips.min()) == pytest.approx(low, rel=5e-4)
    assert float(clips.max()) == pytest.approx(high, rel=5e-4)


def test_another_unit_gives_another_result() -> None:
    x, w = make_layer(8, 64, 96, torch.device("cpu"))
    small, large = (search_layer_faithful(x, w * c, [E2M1]) for c in (1.0, 64.0))
    assert not torch.allclose(small.weight.scale * 64, large.weight.scale)
    assert small.loss != pytest.approx(large.loss / 64**2, rel=1e-3)


@pytest.mark.parametrize("shape", [(16, 24, 200), (16, 40, 30)], ids=["sums", "direct"])
def test_the_order_of_the_code_equals_loops_written_a_second_time(shape) -> None:
    x, w = make_layer(*shape, torch.device("cpu"))
    loops = Loops(x, w)
    loops.run(3)
    found = search_layer_faithful(x, w, FOUR, FOUR)
    for (fields, bias), choice in ((loops.w_now, found.weight), (loops.x_now, found.activation)):
        assert (choice.spec.exponent_bits, choice.spec.mantissa_bits) == fields
        own = bias_of(choice.scale * choice.spec.max, choice.spec)
        torch.testing.assert_close(own.float(), bias, rtol=0, atol=1e-4)


def test_both_orders_and_that_there_is_nothing_random() -> None:
    x, w = make_layer(8, 32, 64, torch.device("cpu"))
    paper = FaithfulOptions(order=Order.PAPER, rounds=2)
    first, again = (search_layer_faithful(x, w, FOUR, FOUR, options=paper) for _ in range(2))
    assert torch.equal(first.weight.scale, again.weight.scale)
    assert first.loss == again.loss == pytest.approx(min(first.by_weight.values()), rel=1e-5)
    code = search_layer_faithful(x, w, FOUR, FOUR, options=FaithfulOptions(rounds=2))
    assert set(code.by_activation) == set(paper_names := [spec.name for spec in FOUR])
    assert set(code.rtn) == {(a, b) for a in paper_names for b in paper_names}
    assert code.loss == pytest.approx(min(code.by_activation.values()), rel=1e-5)


def test_rows_of_zeros_and_numbers_at_the_ends_of_fp32() -> None:
    w = torch.tensor([[0.0, 0.0], [3e38, 1e38], [2e-38, 1e-38]])
    found = search_layer_faithful(torch.eye(2), w, FOUR)
    assert found.weight.scale[0].item() == 1.0
    assert bool((found.weight.scale.isfinite() & (found.weight.scale >= 2.0**-126)).all())


def test_options_are_checked() -> None:
    with pytest.raises(
        OptionError, match="at least one round, exponent bit and byte, not rounds=0"
    ):
        FaithfulOptions(rounds=0)
