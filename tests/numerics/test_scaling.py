"""Quantization: bit by bit against the oracle, then the edges that a definition must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import (
    decode,
    dequantize,
    dequantize_packed,
    expand_scale,
    pack,
    quantize,
    quantize_packed,
    sqnr_db,
)
from fpcompiler.operand import Granularity, Operand
from tests.numerics import oracle

OPERANDS = [
    "f4E2M1FN@row:f32/block32:f8E8M0FNU",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU:ceil",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU:floor",
    "f4E2M1FN@token:f32/block16:f8E8M0FNU:rne",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN:mse",
    "f4E1M2FN@row:f32/block16:f8E4M3FN:floor",
    "f4E3M0FN@row:f32/block16:f8E4M3FN:ceil",
    "f4E3M0FN@block128:f32",
    "f6E2M3FN@block32:f8E8M0FNU",
    "f6E2M3FN@token:f32",
    "f6E3M2FN@block32:f8E8M0FNU:floor",
    "f8E4M3FN@block32:f8E8M0FNU:rne",
    "f8E3M4FN@tensor:f32",
    "f8E5M2@block16:f8E4M3FN:mse",
    "f8E3M4@row:f32/block64:f8E8M0FNU:ceil",
    "f8E3M4@block64:f8E8M0FNU",
    "f8E4M3FN",
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difficult(rows: int, k: int) -> Tensor:
    """Rows of every size, with zeros, outliers, ties, subnormal numbers and equal magnitudes."""
    x = gaussian(rows, k)
    x *= torch.exp2(torch.linspace(-130, 126, rows).round())[:, None] / 4
    x[0] = 0.0
    x[1] = 1e-42
    x[2, : k // 2] = 0.0
    x[3] = torch.linspace(-6, 6, k).mul(4).round().div(4)
    x[4, ::7] *= 1000
    x[5] = 1.0
    x[6, 32:64] = x[6, 32:64] * 2.0**-40
    x[7, :16] = torch.finfo(torch.float32).max
    return x


def levels(scales: tuple[Tensor, ...], operand: Operand) -> list[Tensor]:
    return [
        scale if level.spec is None else decode(scale, level.spec)
        for scale, level in zip(scales, operand.levels, strict=True)
    ]


@pytest.mark.parametrize("text", OPERANDS)
@pytest.mark.parametrize("k", [64, 75])
def test_equals_the_oracle(text: str, k: int) -> None:
    operand = Operand.parse(text)
    x = difficult(24, k)
    if operand.outer and operand.outer.granularity is Granularity.TENSOR:
        x = x[2:7]  # the definition is about one tensor, so keep it from being all outlier
    with np.errstate(all="ignore"):
        codes, scales = oracle.quantize(x.numpy(), text)
    got_codes, got_scales = quantize(x, operand)
    for expected, got in zip(scales, levels(got_scales, operand), strict=True):
        np.testing.assert_array_equal(got.expand(expected.shape), expected)
    np.testing.assert_array_equal(got_codes, codes)


@pytest.mark.parametrize("text", OPERANDS)
def test_dequantize_is_code_times_total(text: str) -> None:
    operand = Operand.parse(text)
    x = gaussian(5, 75)
    codes, scales = quantize(x, operand)
    total = torch.ones(1)
    for level, scale in zip(operand.levels, levels(scales, operand), strict=True):
        wide = scale.repeat_interleave(level.block, -1)[:, :75] if level.block else scale
        total = total * wide
    expected = decode(codes, operand.format) * total
    assert torch.equal(dequantize(codes, scales, operand), expected)
    assert torch.equal(
        dequantize(codes, scales, operand, torch.bfloat16), expected.to(torch.bfloat16)
    )
    if operand.levels:
        assert torch.equal(expand_scale(scales, operand, 75).expand(5, 75), total.expand(5, 75))


@pytest.mark.parametrize(
    ("text", "decibel"),
    [
        ("f4E2M1FN@tensor:f32/block16:f8E4M3FN", 20.4),
        ("f4E2M1FN@block32:f8E8M0FNU:ceil", 18.8),
        ("f6E2M3FN@block32:f8E8M0FNU:ceil", 31.0),
        ("f6E3M2FN@block32:f8E8M0FNU:ceil", 25.5),
        ("f8E4M3FN@block32:f8E8M0FNU:ceil", 31.5),
        ("f8E4M3FN@block32:f8E8M0FNU:floor", 30.7),
        ("f8E5M2@block32:f8E8M0FNU:ceil", 25.5),
    ],
)
def test_sqnr_of_gaussian_values(text: str, decibel: float) -> None:
    """Numbers measured with numpy and ml_dtypes on 4096 x 4096 values."""
    operand, x = Operand.parse(text), gaussian(512, 1024)
    assert sqnr_db(x, dequantize(*quantize(x, operand), operand)) == pytest.approx(decibel, abs=0.2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("f4E2M1FN", [0, -0.725, 1.45, 2.9]),
        ("f4E1M2FN", [0, -0.828571, 1.242857, 2.9]),
        ("f4E3M0FN", [0.090625, -0.725, 1.45, 2.9]),
    ],
)
def test_worked_numbers_of_llm_fp4(name: str, expected: list[float]) -> None:
    """Min-max quantization with a real exponent bias; a bias b there is a scale 2**-b here."""
    operand = Operand.parse(f"{name}@row:f32")
    codes, scales = quantize(torch.tensor([0.1, -0.7, 1.3, 2.9]), operand)
    torch.testing.assert_close(
        dequantize(codes, scales, operand), torch.tensor(expected), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "bias", "codes", "expected"),
    [
        ("f6E2M3FN", 1.528379, [0, -5, 2, 15], [0, -1.733333, 0.693333, 5.2]),
        ("f8E3M4FN", 5.575685, [1.375, -80, 31, 248], [0.028831, -1.677419, 0.65, 5.2]),
        ("f6E3M2FN", 5.428843, [1.5, -80, 28, 224], [0.034821, -1.857143, 0.65, 5.2]),
    ],
)
def test_worked_numbers_per_token(
    name: str, bias: float, codes: list[float], expected: list[float]
) -> None:
    """The numbers are on the grid of bias 0, which is ours times ``2**bias`` of the format."""
    operand = Operand.parse(f"{name}@token:f32")
    got, scales = quantize(torch.tensor([[0.03, -1.7, 0.66, 5.2]]), operand)
    shift = 2.0**operand.format.bias
    assert (decode(got, operand.format) * shift).tolist() == [codes]
    assert scales[0].item() / shift == pytest.approx(2.0**-bias, rel=1e-6)
    torch.testing.assert_close(
        dequantize(got, scales, operand), torch.tensor([expected]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("text", OPERANDS)
@pytest.mark.parametrize("shape", [(7,), (75,), (3, 40), (2, 3, 33), (2, 1, 2, 32)])
def test_shapes(text: str, shape: tuple[int, ...]) -> None:
    operand, k = Operand.parse(text), shape[-1]
    codes, scales = quantize(gaussian(*shape), operand)
    expected = {
        Granularity.TENSOR: (1,) * len(shape),
        Granularity.ROW: (*shape[:-1], 1),
        Granularity.TOKEN: (*shape[:-1], 1),
    }
    assert (codes.dtype, codes.shape) == (torch.uint8, shape)
    for level, scale in zip(operand.levels, scales, strict=True):
        blocks = (*shape[:-1], math.ceil(k / (level.block or 1)))
        assert scale.shape == expected.get(level.granularity, blocks)
        assert scale.dtype == (torch.float32 if level.is_real else torch.uint8)
    assert dequantize(codes, scales, operand).shape == shape


@pytest.mark.parametrize("text", OPERANDS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 40), (2, 0, 33)])
def test_empty_tensors(text: str, shape: tuple[int, ...]) -> None:
    operand = Operand.parse(text)
    codes, scales = quantize(torch.empty(shape), operand)
    assert codes.shape == shape
    assert dequantize(codes, scales, operand).shape == shape
    packed, _ = quantize_packed(torch.empty(shape), operand)
    assert packed.shape[:-1] == shape[:-1]


@pytest.mark.parametrize("text", OPERANDS)
def test_quantize_packed_is_quantize_and_pack(text: str) -> None:
    operand = Operand.parse(text)
    for x in (gaussian(3, 75), gaussian(2, 5, 64), gaussian(7)):
        codes, scales = quantize(x, operand)
        packed, same = quantize_packed(x, operand)
        assert torch.equal(packed, pack(codes, operand.format.storage_bits))
        assert all(map(torch.equal, scales, same))


@pytest.mark.parametrize("text", OPERANDS)
def test_dequantize_packed_is_unpack_and_dequantize(text: str) -> None:
    operand = Operand.parse(text)
    for x in (gaussian(3, 75), gaussian(2, 5, 64), gaussian(7), torch.empty(2, 0)):
        k = x.shape[-1]
        codes, scales = quantize(x, operand)
        packed = pack(codes, operand.format.storage_bits)
        expected = dequantize(codes, scales, operand)
        assert torch.equal(dequantize_packed(packed, scales, operand, k), expected)
        out = torch.empty(x.shape)
        assert dequantize_packed(packed, scales, operand, k, out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("text", OPERANDS)
def test_zeros_have_scale_one(text: str) -> None:
    operand = Operand.parse(text)
    codes, scales = quantize(torch.zeros(3, 75), operand)
    assert not codes.any()
    assert all(bool((scale == 1).all()) for scale in levels(scales, operand))


def test_a_zero_block_beside_others() -> None:
    operand = Operand.parse("f4E2M1FN@row:f32/block32:f8E8M0FNU")
    x = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 5.0)], -1)
    codes, scales = quantize(x, operand)
    assert scales[1].tolist() == [[127, 127]] * 2
    assert torch.equal(dequantize(codes, scales, operand)[:, :32], torch.zeros(2, 32))


@pytest.mark.parametrize("text", OPERANDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 74, 150])
def test_what_is_no_number_is_refused(text: str, bad: float, place: int) -> None:
    x = gaussian(4, 75)
    x.view(-1)[place] = bad
    with pytest.raises(NumericsError, match=r"layer 'model\.fc': input holds NaN/Inf"):
        quantize(x, Operand.parse(text), layer="model.fc")
    with pytest.raises(NumericsError, match=r"^the model: input holds NaN/Inf"):
        quantize_packed(x.double(), Operand.parse(text))


def test_what_cannot_be_quantized_is_refused() -> None:
    operand = Operand.parse(OPERANDS[0])
    with pytest.raises(NumericsError, match=r"layer 'a': .* not torch\.int64 \[3\]"):
        quantize(torch.arange(3), operand, layer="a")
    with pytest.raises(NumericsError, match=r"not torch\.float32 \[\]"):
        quantize(torch.tensor(1.0), operand)
    with pytest.raises(NumericsError, match="beyond fp32"):
        quantize(torch.tensor([1e300], dtype=torch.float64), operand)


def test_scales_that_do_not_fit_are_refused() -> None:
    operand = Operand.parse(OPERANDS[0])
    codes, scales = quantize(gaussian(2, 64), operand)
    with pytest.raises(NumericsError, match="has 2 scales, not 1"):
        dequantize(codes, scales[:1], operand)
    with pytest.raises(NumericsError, match="have 3 scales a row, not 2"):
        expand_scale(scales, operand, 65)
    with pytest.raises(NumericsError, match="f8E4M3FN has 0 scales"):
        expand_scale((), Operand.parse("f8E4M3FN"), 65)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("text", OPERANDS)
def test_other_dtypes_are_the_same_as_fp32(text: str, dtype: torch.dtype) -> None:
    x = gaussian(4, 75).to(dtype)
    got, expected = quantize(x, Operand.parse(text)), quantize(x.float(), Operand.parse(text))
    assert torch.equal(got[0], expected[0])
    assert all(map(torch.equal, got[1], expected[1]))


@pytest.mark.parametrize("text", OPERANDS)
def test_strides_do_not_matter(text: str) -> None:
    operand, x = Operand.parse(text), gaussian(12, 10, 64)
    for view in (x.transpose(0, 2), x[:, ::2], x[..., 1::3], x[:, 1], x.expand(2, 12, 10, 64)):
        got, expected = quantize(view, operand), quantize(view.contiguous(), operand)
        assert torch.equal(got[0], expected[0])
        assert all(map(torch.equal, got[1], expected[1]))


@pytest.mark.parametrize("text", [OPERANDS[0], OPERANDS[4], OPERANDS[9]])
def test_chunks_do_not_show(text: str) -> None:
    operand = Operand.parse(text)
    x = gaussian(1500, 480)
    x[700, 7] = 9.0
    codes, scales = quantize(x, operand)
    if operand.outer and operand.outer.granularity is Granularity.TENSOR:
        x = torch.cat([x, x[700:701]])  # both halves hold the largest value
    for rows in (slice(0, 750), slice(750, 1500)):
        piece = x[rows] if len(x) == 1500 else torch.cat([x[rows], x[-1:]])
        part, part_scales = quantize(piece, operand)
        assert torch.equal(part[:750], codes[rows])
        assert torch.equal(part_scales[-1][:750], scales[-1][rows])


@pytest.mark.parametrize("text", OPERANDS)
def test_huge_and_tiny_values(text: str) -> None:
    operand = Operand.parse(text)
    for size in (3e38, 1e-38, 1e-44):
        x = gaussian(4, 64).clamp(-1, 1) * size
        codes, scales = quantize(x, operand)
        total = expand_scale(scales, operand, 64) if scales else torch.ones(1)
        assert bool((total >= 2.0**-126).all())
        assert bool(total.isfinite().all())
        assert bool(decode(codes, operand.format).isfinite().all())


def test_the_scale_of_a_block_stays_on_its_grid() -> None:
    x = gaussian(64, 64) * torch.exp2(torch.linspace(-140, 100, 64))[:, None]
    for rounding in ("floor", "ceil", "rne", "mse"):
        for kind in ("f8E8M0FNU", "f8E4M3FN"):
            operand = Operand.parse(f"f4E2M1FN@tensor:f32/block16:{kind}:{rounding}")
            codes = quantize(x, operand)[1][1]
            values = decode(codes, FORMATS[kind])
            assert bool((values > 0).all()), "no scale is zero or NaN"
