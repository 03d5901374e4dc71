"""Activations are quantized as by ``numerics``: the same codes, the same scales, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpcompiler.interop.onnx.portable import Portable
from fpcompiler.interop.onnx.standard import Standard
from fpcompiler.numerics import dequantize, quantize, quantize_within
from fpcompiler.operand import Operand
from tests.interop.onnx_graphs import on_onnxruntime, on_reference, quantizer, quantizer_within

OPERANDS = [
    "f6E2M3FN@block32:f8E8M0FNU",
    "f4E2M1FN@block32:f8E8M0FNU:floor",
    "f4E2M1FN@block32:f8E8M0FNU:ceil",
    "f8E4M3FN@block64:f8E8M0FNU:rne",
    "f6E3M2FN@token:f32/block32:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block32:f8E8M0FNU:floor",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN:mse",
    "f4E2M1FN@token:f32/block16:f8E4M3FN:floor",
    "f4E2M1FN@block16:f8E4M3FN:ceil",
    "f4E3M0FN@block128:f32",
    "f4E1M2FN@token:f32",
    "f6E5M0FN@tensor:f32",
    "f8E5M2@token:f32",
    "f8E3M4FN@token:f32",
    "f8E4M3FN",
]


def values(k: int) -> torch.Tensor:
    """Values of all sizes, zeros, ties and powers of two among them: ``[9, 3, k]``."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(9, 3, k, generator=generator)
    x[1] *= 1e30
    x[2] *= 1e-30
    x[2, 1] *= 1e-12
    x[3, 0] = 0
    x[4] = torch.randint(-12, 13, (3, k), generator=generator) * 0.25
    x[5] = torch.ldexp(torch.ones(3, k), torch.randint(-9, 9, (3, k), generator=generator))
    x[6, :, :7] *= 3000
    x[7] = torch.randint(-3, 4, (3, k), generator=generator) * 1.1e38
    x[8, :, ::2] = -0.0
    return x


@pytest.mark.parametrize("k", [128, 40])
@pytest.mark.parametrize("text", OPERANDS)
def test_codes_scales_and_values_are_those_of_numerics(text: str, k: int) -> None:
    operand, x = Operand.parse(text), values(k)
    codes, scales = quantize(x, operand)
    model = quantizer(operand, ["n", 3, k], Portable(), codes=True)
    found, *parts = on_onnxruntime(model, x)
    for expected, part in zip((codes, *scales), parts, strict=True):
        if part is parts[0]:
            unsigned_zeros = expected & (operand.format.code_count // 2 - 1) == 0
            expected = torch.where(unsigned_zeros, 0, expected)
        np.testing.assert_array_equal(part, expected.numpy())
    np.testing.assert_array_equal(found, dequantize(codes, scales, operand).numpy())


@pytest.mark.parametrize("text", OPERANDS)
def test_the_standard_style_gives_the_same_values(text: str) -> None:
    operand, x = Operand.parse(text), values(64)[:7]
    expected = dequantize(*quantize(x, operand), operand)
    model = quantizer(operand, ["n", 3, 64], Standard(28), codes=False)
    np.testing.assert_array_equal(on_reference(model, x)[0], expected.numpy())


@pytest.mark.parametrize("outer", [2.0**-9, 0.003, 40.0])
@pytest.mark.parametrize(
    "text",
    [
        "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
        "f4E2M1FN@tensor:f32/block16:f8E4M3FN:mse",
    ],
)
def test_a_scale_of_the_tensor_may_be_given(text: str, outer: float) -> None:
    operand, x = Operand.parse(text), values(40)
    given = torch.tensor([outer])
    codes, blocks = quantize_within(x, given, operand)
    expected = dequantize(codes, (given.reshape(1, 1, 1), blocks), operand)
    model = quantizer_within(operand, outer, 40, Portable())
    found, its_codes, its_blocks = on_onnxruntime(model, x)
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(its_blocks, blocks.numpy())
    np.testing.assert_array_equal(its_codes, torch.where(codes & 7 == 0, 0, codes).numpy())
    model = quantizer_within(operand, outer, 40, Standard(28))
    with np.errstate(over="ignore"):  # Blocks beyond what the scale reaches saturate.
        np.testing.assert_array_equal(on_reference(model, x)[0], expected.numpy())
