"""Codes for scales that are given: those of quantize for its scales, saturated for smaller ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import decode, dequantize, quantize, quantize_with
from fpcompiler.operand import Operand
from tests.models import normal

OPERANDS = [
    "f4E2M1FN@row:f32",
    "f4E1M2FN@tensor:f32",
    "f6E2M3FN@token:f32/block32:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f8E4M3FN@block64:f32",
    "f8E5M2",
]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(OPERANDS),
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 1 << 16),
)
def test_with_its_own_scales_the_codes_are_those_of_quantize(text, shape, k, dtype, seed) -> None:
    operand, x = Operand.parse(text), (normal(*shape, k, seed=seed) ** 3).to(dtype)
    codes, scales = quantize(x, operand)
    found = quantize_with(x, scales, operand)
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(OPERANDS[:2]), st.floats(0.01, 0.9), st.integers(0, 1 << 16))
def test_values_beyond_the_largest_saturate(text: str, part: float, seed: int) -> None:
    operand, x = Operand.parse(text), normal(3, 40, seed=seed)
    (scale,) = quantize(x, operand)[1]
    small = scale * part
    largest = operand.format.max * small
    value = dequantize(quantize_with(x, (small,), operand), (small,), operand)
    beyond = x.abs() >= largest
    assert bool(beyond.any())
    assert torch.equal(value[beyond], (largest * x.sign())[beyond])
    assert bool((value.abs() <= largest).all())


def test_ties_and_zeros_are_rounded_as_everywhere() -> None:
    operand = Operand.parse("f4E2M1FN@tensor:f32")
    x = torch.tensor([0.5, 1.5, 2.5, 5.0, -0.25, 0.0]) * 2
    codes = quantize_with(x, (torch.tensor([2.0]),), operand)
    assert decode(codes, operand.format).tolist() == [0.5, 1.5, 2.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("x", "scales", "message"),
    [
        (torch.full((2, 4), torch.nan), [torch.ones(2, 1)], "layer 'up': input holds NaN/Inf"),
        (torch.full((2, 4), torch.inf), [torch.ones(2, 1)], "layer 'up': input holds NaN/Inf"),
        (torch.ones(2, 4).double() * 1e300, [torch.ones(2, 1)], "values beyond fp32"),
        (torch.ones(2, 4).int(), [torch.ones(2, 1)], r"not torch\.int32 \[2, 4\]"),
        (torch.tensor(1.0), [torch.ones(1)], r"not torch\.float32 \[\]"),
        (torch.ones(2, 4), [], "f4E2M1FN@row:f32 has 1 scales, not 0"),
        (torch.ones(2, 4), [torch.ones(2, 1)] * 2, "has 1 scales, not 2"),
        (torch.ones(2, 4), [torch.ones(2, 4)], "4 values with a scale row:f32 have 1 scales a row"),
    ],
)
def test_what_does_not_fit_is_refused(x, scales, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        quantize_with(x, tuple(scales), Operand.parse("f4E2M1FN@row:f32"), layer="up")
