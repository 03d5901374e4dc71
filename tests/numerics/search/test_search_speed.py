"""The benchmark that compares the search with the published loops measures what it says."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from examples.benchmarks import search_speed
from fpcompiler.formats import parse_format
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.operand import Operand
from tests.models import normal


@pytest.mark.parametrize(
    ("limit", "fraction", "source"),
    [(1e9, 1.0, "the loops"), (1e-9, 0.01, "search_layer_faithful")],
)
def test_a_small_layer(limit: float, fraction: float, source: str) -> None:
    options = Namespace(rows=8, inputs=16, tokens=48, rounds=1, limit=limit)
    report = search_speed.measure(options, torch.device("cpu"))
    assert report["loops_fraction_of_candidates_timed"] == fraction
    assert report["loops_loss_from"] == source
    assert report["times_faster"] == report["loops_seconds"] / report["search_seconds"]
    assert 0 < report["search_loss"] <= report["round_to_nearest_loss"] * (1 + 1e-5)


@pytest.mark.parametrize("fields", search_speed.FORMATS)
def test_its_rounding_is_that_of_numerics(fields: tuple[int, int]) -> None:
    w = normal(20, 50).double()
    bias = search_speed.min_max_bias(w.abs().amax(1, keepdim=True), fields)
    operand = Operand.parse(f"{parse_format('e{}m{}'.format(*fields))}@row:f32")
    expected = dequantize(*quantize(w, operand), operand, torch.float64)
    found = search_speed.fake_quantize(w, bias, fields)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
