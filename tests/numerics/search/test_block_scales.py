"""Scales of blocks chosen by their error: never worse than the operand's own rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import decode, dequantize, expand_scale, quantize
from fpcompiler.numerics.search import quantize_with_scale, search_block_scales
from fpcompiler.operand import Operand
from tests.models import normal

OPERANDS = [
    "f4E2M1FN@block32:f8E8M0FNU",
    "f4E2M1FN@block32:f8E8M0FNU:floor",
    "f4E3M0FN@row:f32/block16:f8E8M0FNU:ceil",
    "f6E2M3FN@row:f32/block32:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E1M2FN@row:f32/block16:f8E4M3FN",
    "f4E2M1FN@block16:f8E4M3FN:mse",
]


def block_errors(w: Tensor, values: Tensor, importance: Tensor | None, width: int) -> Tensor:
    """Return the squared error of each block, fp64 ``[N, blocks]``."""
    squares = (values.double() - w.double()).square()
    squares = squares if importance is None else squares * importance
    padding = -w.shape[1] % width
    return torch.nn.functional.pad(squares, (0, padding)).unflatten(1, (-1, width)).sum(-1)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    rows, k, seed = draw(st.integers(1, 5)), draw(st.integers(1, 70)), draw(st.integers(0, 1 << 16))
    w = normal(rows, k, seed=seed) ** draw(st.sampled_from([1, 3]))
    w[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e-30, 1e30]))
    importance = normal(k, seed=seed + 1).square() if draw(st.booleans()) else None
    if importance is not None and draw(st.booleans()):
        importance[: k // 2] = 0.0
    return w, importance


@settings(deadline=None, max_examples=60)
@given(weights(), st.sampled_from(OPERANDS))
def test_never_worse_than_the_rule_of_the_operand(case, text: str) -> None:
    (w, importance), operand = case, Operand.parse(text)
    codes, scales = search_block_scales(w, operand, importance)
    own_codes, own_scales = quantize(w, operand)
    assert [s.shape for s in scales] == [s.shape for s in own_scales]
    assert [s.dtype for s in scales] == [s.dtype for s in own_scales]
    found = block_errors(w, dequantize(codes, scales, operand), importance, operand.block.block)
    own = dequantize(own_codes, own_scales, operand)
    plain = block_errors(w, own, importance, operand.block.block)
    # Errors are compared after fp32 squares: each is good to a few times 2**-24. Where the product
    # of scales rounds, an error may differ by that much of the largest value.
    largest = w.double().abs().amax(1, keepdim=True).square() * w.shape[1] * 2.0**-40
    weight = 1.0 if importance is None else float(importance.max())
    assert bool((found <= plain * (1 + 1e-5) + largest * weight).all())
    assert bool((expand_scale(scales, operand, w.shape[1]) >= 2.0**-126).all())


@pytest.mark.parametrize("text", OPERANDS)
def test_codes_are_those_of_the_scales(text: str) -> None:
    operand, w = Operand.parse(text), normal(7, 75)
    codes, scales = search_block_scales(w, operand)
    total = expand_scale(scales, operand, 75)
    expected = quantize_with_scale(w.reshape(-1, 1), total.reshape(-1, 1), operand.format)
    assert torch.equal(codes, expected.view(7, 75))


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_no_neighbour_is_better(step: int) -> None:
    operand, w = Operand.parse("f4E2M1FN@block32:f8E8M0FNU:floor"), normal(64, 96)
    _, (own,) = quantize(w, operand)
    codes, scales = search_block_scales(w, operand)
    found = block_errors(w, dequantize(codes, scales, operand), None, 32)
    near = (own + step).to(torch.uint8)
    total = expand_scale((near,), operand, 96).reshape(-1, 1)
    codes = quantize_with_scale(w.reshape(-1, 1), total, operand.format).view(64, 96)
    assert bool((found <= block_errors(w, dequantize(codes, (near,), operand), None, 32)).all())


def test_floor_and_nearest_are_improved() -> None:
    w = normal(64, 128)
    for text in ("f4E2M1FN@block32:f8E8M0FNU:floor", "f4E2M1FN@tensor:f32/block16:f8E4M3FN"):
        operand = Operand.parse(text)
        values = dequantize(*search_block_scales(w, operand), operand)
        own = dequantize(*quantize(w, operand), operand)
        assert (values - w).square().sum() < 0.98 * (own - w).square().sum()


def test_four_over_six() -> None:
    operand = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")
    w = torch.full((2, 16), 3.0)
    w[0, 0] = 4.0  # 3 * 6 / 4 = 4.5 is no number of E2M1, 3 is
    w[1] = 6.0 * 448
    codes, (outer, inner) = search_block_scales(w, operand)
    assert outer.item() == 1.0
    assert decode(inner, operand.block.spec).tolist() == [[1.0], [448.0]]
    assert torch.equal(dequantize(codes, (outer, inner), operand), w)
    own = dequantize(*quantize(w, operand), operand)
    assert not torch.equal(own, w)


def test_importance_decides() -> None:
    operand = Operand.parse("f4E2M1FN@block32:f8E8M0FNU")
    w = torch.full((1, 32), 0.3)
    w[0, 0] = 7.9  # by the unweighted error the scale is 2, where 0.3 is rounded to 0
    for channel, kept in ((0, 8.0), (1, 0.25)):
        importance = torch.zeros(32)
        importance[channel] = 1.0
        values = dequantize(*search_block_scales(w, operand, importance), operand)
        assert values[0, channel] == kept
    equal = search_block_scales(w, operand, torch.full((32,), 1e30))
    assert torch.equal(equal[0], search_block_scales(w, operand)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_their_fp32_values(dtype: torch.dtype) -> None:
    operand, w = Operand.parse(OPERANDS[4]), normal(4, 40).to(dtype)
    (codes, scales), (same, same_scales) = (
        search_block_scales(tensor, operand) for tensor in (w, w.float())
    )
    assert torch.equal(codes, same)
    assert all(map(torch.equal, scales, same_scales))


def test_zeros_and_nothing() -> None:
    operand = Operand.parse(OPERANDS[0])
    codes, (scale,) = search_block_scales(torch.zeros(2, 40), operand)
    assert not codes.any()
    assert decode(scale, operand.block.spec).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert search_block_scales(torch.zeros(0, 40), operand)[0].shape == (0, 40)


@pytest.mark.parametrize(
    ("w", "text", "importance", "match"),
    [
        (torch.ones(2, 4), "f4E2M1FN@row:f32", None, "layer 'up': f4E2M1FN@row:f32 has no blocks"),
        (torch.ones(2, 4), "f4E2M1FN@block32:f32", None, "search the clips of rows instead"),
        (torch.ones(4), OPERANDS[0], None, r"layer 'up': a weight is \[N, K\], not \[4\]"),
        (torch.ones(2, 4), OPERANDS[0], torch.ones(3), "the importance of 4 channels"),
        (torch.ones(2, 4), OPERANDS[0], -torch.ones(4), "finite and not negative"),
        (torch.full((2, 4), torch.nan), OPERANDS[0], None, "layer 'up': input holds NaN"),
    ],
)
def test_what_cannot_be_searched(w, text, importance, match) -> None:
    with pytest.raises(NumericsError, match=match):
        search_block_scales(w, Operand.parse(text), importance, layer="up")
