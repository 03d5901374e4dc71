"""Quantization with a given scale: the codes of `quantize` where the scale is its own."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import decode, pack, quantize
from fpcompiler.numerics.search import (
    paper_formats,
    quantize_packed_with_scale,
    quantize_with_scale,
)
from fpcompiler.operand import Granularity, Operand, ScaleLevel
from tests.models import normal

SPECS = [spec for bits in (4, 6, 8) for spec in paper_formats(bits)]


@pytest.mark.parametrize("granularity", [Granularity.ROW, Granularity.TENSOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_quantize(spec, dtype, granularity) -> None:
    x = (normal(3, 5, 33) ** 3).to(dtype)
    codes, (scale,) = quantize(x, Operand(spec, (ScaleLevel(granularity),)))
    assert torch.equal(quantize_with_scale(x, scale, spec), codes)
    packed = quantize_packed_with_scale(x, scale, spec)
    assert torch.equal(packed, pack(codes, spec.storage_bits))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_saturates(spec) -> None:
    codes = quantize_with_scale(torch.tensor([[1e30, -1e30]]), torch.tensor([[0.5]]), spec)
    assert decode(codes, spec).tolist() == [[spec.max, -spec.max]]


def test_the_least_scale() -> None:
    x = torch.tensor([[1.0, 3.0, -6.0]]) * 2.0**-126
    codes = quantize_with_scale(x, torch.tensor([[2.0**-126]]), SPECS[1])
    assert decode(codes, SPECS[1]).tolist() == [[1.0, 3.0, -6.0]]


def test_nothing_to_quantize() -> None:
    assert quantize_with_scale(torch.zeros(0, 4), torch.ones(0, 1), SPECS[0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("x", "scale", "text"),
    [
        (torch.ones(2, 3), torch.ones(3, 1), r"one value or \[2, 1\], not torch.float32 \[3, 1\]"),
        (torch.ones(2, 3), torch.ones(1, 1).double(), "not torch.float64"),
        (torch.ones(2, 3), torch.zeros(1, 1), "at least 2"),
        (torch.ones(2, 3), torch.full((2, 1), torch.inf), "must be finite"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(1, 1), "only floating-point"),
        (torch.full((1, 1), torch.nan), torch.ones(1, 1), "layer 'up': input holds NaN"),
    ],
)
def test_what_cannot_be_quantized(x, scale, text) -> None:
    with pytest.raises(NumericsError, match=text):
        quantize_with_scale(x, scale, SPECS[0], layer="up")
