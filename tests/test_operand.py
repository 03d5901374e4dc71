"""Operand texts, what they mean, and what is refused."""

from __future__ import annotations

import pytest

from fpcompiler.errors import FormatError
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Granularity, Operand, ScaleLevel, ScaleRounding


def test_parts() -> None:
    operand = Operand.parse("f4E2M1FN@row:f32/block32:f8E8M0FNU")
    assert operand.format is FORMATS["f4E2M1FN"]
    assert operand.outer == ScaleLevel(Granularity.ROW)
    assert operand.block == ScaleLevel(Granularity.BLOCK, "f8E8M0FNU", 32, ScaleRounding.MSE)
    assert operand.outer.is_real
    assert operand.outer.spec is None
    assert operand.block.spec is FORMATS["f8E8M0FNU"]


@pytest.mark.parametrize(
    ("text", "outer", "block"),
    [
        ("f8E5M2", False, False),
        ("f4E2M1FN@tensor:f32", True, False),
        ("f4E2M1FN@block128:f32", False, True),
        ("f4E2M1FN@token:f32/block16:f8E4M3FN", True, True),
    ],
)
def test_outer_and_block(text: str, outer: bool, block: bool) -> None:
    operand = Operand.parse(text)
    assert (operand.outer is not None, operand.block is not None) == (outer, block)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("e2m1@row:f32/block32:e8m0", "f4E2M1FN@row:f32/block32:f8E8M0FNU"),
        ("e2m1@row:fp32/block32:e8m0:mse", "f4E2M1FN@row:f32/block32:f8E8M0FNU"),
        ("E2M3@block32:E8M0:floor", "f6E2M3FN@block32:f8E8M0FNU:floor"),
        ("e2m1@tensor:F32/block16:e4m3:rne", "f4E2M1FN@tensor:f32/block16:f8E4M3FN"),
        ("e2m1@tensor:f32/block16:e4m3:mse", "f4E2M1FN@tensor:f32/block16:f8E4M3FN:mse"),
        ("f8E4M3FN@", "f8E4M3FN"),
        (" e4m3 ", "f8E4M3FN"),
    ],
)
def test_exact_text(text: str, exact: str) -> None:
    assert str(Operand.parse(text)) == exact
    assert Operand.parse(exact) == Operand.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f4E2M1FN@row", "'row' is no scale level; write for instance row:f32"),
        ("f4E2M1FN@channel:f32", "'channel:f32' is no scale level"),
        (
            "f4E2M1FN@block32:f8E8M0FNU:up",
            "'up' is no scale rounding; one of floor, ceil, rne, mse",
        ),
        ("f4E2M1FN@block33:f32", "block of 33 values is not possible; sizes: 16, 32, 64, 128"),
        ("f4E2M1FN@block:f32", "block of 0 values is not possible"),
        ("f4E2M1FN@row:f8E8M0FNU", "a scale per row is f32 and no block: row:f8E8M0FNU"),
        ("f4E2M1FN@row16:f32", "a scale per row is f32 and no block: row16:f32"),
        ("f4E2M1FN@block32:f8E5M2", "f8E5M2 cannot hold a scale; scale formats: f32, f8E8M0FNU"),
        ("f4E2M1FN@block32:f32:floor", "not rounded to a grid: only rne is possible"),
        ("f4E2M1FN@row:f32/tensor:f32", "cannot be combined: at most one per tensor, row or token"),
        ("f4E2M1FN@block32:f8E8M0FNU/row:f32", "cannot be combined"),
        ("f4E2M1FN@block32:f8E8M0FNU/block16:f8E8M0FNU", "cannot be combined"),
        ("f4E2M1FN@tensor:f32/row:f32/block32:f8E8M0FNU", "cannot be combined"),
        ("f4E2M1FN@row:f32/block32:f32", "makes the outer level redundant"),
        ("f8E8M0FNU@row:f32", "f8E8M0FNU has no sign and cannot hold elements"),
        ("f4E9M9@row:f32", "There is no format 'f4E9M9'"),
        ("", "There is no format ''"),
    ],
)
def test_what_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Operand.parse(text)


@pytest.mark.parametrize(
    ("text", "k", "bits"),
    [
        ("f4E2M1FN@row:f32/block32:f8E8M0FNU", 64, 4 + 32 / 64 + 8 / 32),
        ("f4E2M1FN@tensor:f32/block16:f8E4M3FN", 64, 4 + 8 / 16),
        ("f6E2M3FN@block32:f8E8M0FNU", 33, 6 + 2 * 8 / 33),
        ("f4E2M1FN@block128:f32", 256, 4 + 32 / 128),
        ("f8E5M2", 7, 8),
    ],
)
def test_bits_per_value(text: str, k: int, bits: float) -> None:
    assert Operand.parse(text).bits_per_value(k) == pytest.approx(bits)


def test_operands_are_values() -> None:
    first, second = (Operand.parse(text) for text in ("e2m1@row:f32", "f4E2M1FN@row:f32"))
    assert first == second
    assert len({first, second}) == 1
