"""Columns divided by powers of two: exact in codes and in block scales, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.numerics.folding import divide_columns, takes_powers
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.shift_lowering import container
from fpcompiler.operand import Operand

ROW, BLOCK = Operand.parse("e2m1@row:f32"), Operand.parse("e2m1@row:f32/block32:e8m0")


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["f4E2M1FN", "f4E1M2FN", "f4E3M0FN"]),
    st.sampled_from(["row:f32", "block16:f8E8M0FNU", "row:f32/block32:f8E8M0FNU", "block32:f32"]),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_a_wider_format_holds_the_divided_values(
    name: str, levels: str, limit: int, seed: int
) -> None:
    source = Operand.parse(f"{name}@{levels}")
    k = torch.arange(48) * 7 % (limit + 1)
    wide = [FORMATS[name] for name in ("f6E3M2FN", "f8E4M3FN", "f8E5M2")]
    held = container(source.format, limit, wide)
    target = Operand(held.format, source.levels)
    codes, scales = quantize(weight(4, 48, seed), source)
    folded, moved = divide_columns(
        codes, scales, exact_power(k), (source, target), shift=held.shift
    )
    expected = dequantize(codes, scales, source) * exact_power(-k)
    assert torch.equal(dequantize(folded, moved, target), expected)


@pytest.mark.parametrize(
    "text", ["e2m1@row:f32/block32:e8m0", "e2m1@block32:e8m0", "e3m2@block32:f32"]
)
def test_block_scales_take_the_powers(text: str) -> None:
    operand = Operand.parse(text)
    k = torch.tensor([3, 0, 31]).repeat_interleave(32)[:80]
    codes, scales = quantize(weight(4, 80), operand)
    folded, moved = divide_columns(codes, scales, exact_power(k), (operand, operand))
    assert torch.equal(folded, codes)
    assert takes_powers(operand)
    expected = dequantize(codes, scales, operand) * exact_power(-k)
    assert torch.equal(dequantize(folded, moved, operand), expected)


def test_only_scales_that_are_powers_or_real_take_powers() -> None:
    assert not takes_powers(ROW)
    assert not takes_powers(Operand.parse("e2m1@tensor:f32/block16:e4m3"))


def test_a_block_needs_one_power() -> None:
    codes, scales = quantize(weight(2, 64), BLOCK)
    powers = exact_power(torch.arange(64) % 2)
    with pytest.raises(NumericsError, match=r"^layer 'up': the scales of f4E2M1FN@row:f32/block32"):
        divide_columns(codes, scales, powers, (BLOCK, BLOCK), layer="up")


@pytest.mark.parametrize("powers", [torch.full((64,), 3.0), torch.ones(63), torch.zeros(64)])
def test_other_numbers_than_powers_of_two_are_refused(powers: Tensor) -> None:
    codes, scales = quantize(weight(2, 64), BLOCK)
    with pytest.raises(NumericsError, match="64 columns can be divided by as many powers of two"):
        divide_columns(codes, scales, powers, (BLOCK, BLOCK))


@pytest.mark.parametrize("text", ["e2m1@block32:e8m0", "e2m1@block32:f32"])
def test_a_scale_that_would_be_too_small_is_refused(text: str) -> None:
    operand = Operand.parse(text)
    codes, scales = quantize(weight(2, 32) * 2.0**-115, operand)
    with pytest.raises(NumericsError, match=r"times 2\*\*-31 has no exact value"):
        divide_columns(codes, scales, torch.full((32,), 2.0**31), (operand, operand))
