"""Quantization within a given scale of the tensor, and scales that are powers of two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import dequantize, quantize, quantize_within
from fpcompiler.numerics.given import power_of_two, shared_power_scales
from fpcompiler.operand import Operand
from tests.models import normal

NVFP4 = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")


@pytest.mark.parametrize("shape", [(16,), (3, 40), (2, 3, 64), (0, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_its_own_scale_it_is_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape).to(dtype)
    codes, (outer, blocks) = quantize(x, NVFP4)
    within = quantize_within(x, outer, NVFP4)
    assert torch.equal(within[0], codes)
    assert torch.equal(within[1], blocks)
    arguments = (x, outer, str(NVFP4), "l")
    torch.library.opcheck(torch.ops.fpc.quantize_within.default, arguments)
    assert all(map(torch.equal, torch.ops.fpc.quantize_within(*arguments), within))


def test_blocks_beyond_the_scale_saturate() -> None:
    outer = torch.tensor([[2.0**-8]])
    x = torch.full((1, 16), 1000.0)
    codes, blocks = quantize_within(x, outer, NVFP4)
    value = dequantize(codes, (outer, blocks), NVFP4)
    assert bool((value == 6 * 448 * 2.0**-8).all())


@pytest.mark.parametrize(
    "text", ["f4E2M1FN@block32:f8E8M0FNU", "f4E2M1FN@row:f32/block16:f8E4M3FN"]
)
def test_other_levels_are_refused(text: str) -> None:
    with pytest.raises(NumericsError, match="no scale of the tensor"):
        quantize_within(normal(2, 32), torch.ones(1), Operand.parse(text))


def test_nan_is_refused() -> None:
    with pytest.raises(NumericsError, match="layer 'l': input holds NaN"):
        quantize_within(normal(2, 32) * math.nan, torch.ones(1), NVFP4, layer="l")


@settings(deadline=None, max_examples=200)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_power_of_two_is_the_least_that_clips_nothing(amax: float) -> None:
    scale = float(power_of_two(amax, NVFP4))
    assert math.frexp(scale)[0] == 0.5
    assert scale * 2688 >= amax > scale / 2 * 2688


def test_zeros_have_the_scale_one() -> None:
    assert float(power_of_two(0.0, NVFP4)) == 1


def test_weights_share_the_scale_of_the_largest() -> None:
    weights = [normal(8, 32), normal(4, 32, seed=1) * 10]
    (first, _), (second, _) = shared_power_scales(weights, NVFP4)
    assert (
        float(first) == float(second) == float(power_of_two(float(weights[1].abs().max()), NVFP4))
    )
    for weight, scales in zip(weights, shared_power_scales(weights, NVFP4), strict=True):
        codes, blocks = quantize_within(weight, scales[0], NVFP4)
        assert torch.equal(blocks, scales[1])
        values = dequantize(codes, scales, NVFP4)
        assert torch.equal(values.bfloat16().float(), values)  # exact in bf16
        error = (values - weight).square().sum() / weight.square().sum()
        own_codes, own = quantize(weight, NVFP4)
        own_error = (dequantize(own_codes, own, NVFP4) - weight).square().sum()
        assert error < 1.2 * own_error / weight.square().sum()
    with pytest.raises(NumericsError, match="NaN"):
        shared_power_scales([weights[0] * math.nan], NVFP4)
