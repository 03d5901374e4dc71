"""A flush-to-zero mode of the CPU, which other libraries turn on, changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, decode_packed, dequantize, encode, pack, quantize, round_to
from fpcompiler.numerics.rounding import value_table
from fpcompiler.operand import Operand
from tests.numerics.test_scaling import OPERANDS, difficult

TINY = torch.arange(1, 1 << 23, 4099, dtype=torch.int32).view(1, -1).view(torch.float32)
"""Subnormal numbers, made from their bits."""

SMALL = torch.cat([TINY, -TINY, torch.linspace(1e-38, 1e-36, TINY.shape[1]).view(1, -1)])


@contextmanager
def flushing() -> Iterator[None]:
    number = torch.tensor([2.0**-127])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        assert (number * 1.5).view(torch.int32).item() == 0, "the mode is not on"
        yield
    finally:
        torch.set_flush_denormal(False)
    assert (number * 1.5).view(torch.int32).item() != 0, "the mode is still on"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("text", OPERANDS)
@pytest.mark.parametrize("name", ["difficult", "small"])
def test_quantize(text: str, name: str) -> None:
    operand = Operand.parse(text)
    x = {"difficult": difficult(24, 75), "small": SMALL}[name]
    codes, scales = quantize(x, operand)
    value = dequantize(codes, scales, operand)
    with flushing():
        got, got_scales = quantize(x, operand)
        got_value = dequantize(codes, scales, operand)
    assert torch.equal(got, codes)
    assert all(map(same_bits, got_scales, scales))
    # A product that is itself subnormal is the one thing that the mode is for.
    normal = (value.view(torch.int32) & 0x7F80_0000) != 0
    assert same_bits(got_value[normal], value[normal])
    assert bool(((got_value == value) | (got_value == 0))[~normal].all())


@pytest.mark.parametrize("spec", FORMATS.values(), ids=str)
def test_codes(spec: FloatSpec) -> None:
    x = torch.cat([difficult(24, 75).flatten(), SMALL.flatten()])
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    packed, k = pack(codes, spec.storage_bits), spec.code_count

    def results() -> list[torch.Tensor]:
        return [
            encode(x, spec),
            round_to(x, spec),
            decode(codes, spec),
            decode_packed(packed, spec, k),
        ]

    expected = results()
    with flushing():
        got = results()
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize("spec", FORMATS.values(), ids=str)
def test_tables_that_are_first_needed_in_the_mode(spec: FloatSpec) -> None:
    expected = value_table(spec)
    with flushing():
        assert same_bits(value_table(spec), expected)


def test_some_codes_of_subnormal_numbers_are_not_zero() -> None:
    operand = Operand.parse("f6E2M3FN@row:f32")
    with flushing():
        codes, _ = quantize(SMALL, operand)
    assert bool((codes[:2] & 31).any())
