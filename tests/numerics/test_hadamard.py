"""The block Hadamard transform: worked numbers, its inverse, and where the signs must stand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.numerics.hadamard import HADAMARD_BLOCKS, hadamard, inverse_hadamard, random_signs
from fpcompiler.operand import Operand
from tests.models import normal


def group_of_32() -> Tensor:
    return (torch.arange(32) * 7 % 32 - 15.5) / 8


def test_worked_numbers_of_quartet() -> None:
    y = hadamard(group_of_32(), 32)
    assert float(y.abs().max()) == pytest.approx(3.535534, abs=1e-6)
    assert float(y.std(correction=0)) == pytest.approx(1.102144, abs=1e-6)
    wanted = torch.tensor([0.0, -0.707107, 0.0, -1.414214]) / 2
    torch.testing.assert_close(y[:4], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", HADAMARD_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_matrix_of_scipy(block: int, dtype: torch.dtype) -> None:
    x = normal(3, 5, 2 * block).to(dtype)
    matrix = torch.from_numpy(sylvester(block)).double() / math.sqrt(block)
    wanted = torch.cat([part.double() @ matrix for part in x.split(block, -1)], -1).to(dtype)
    y = hadamard(x, block)
    assert y.dtype is dtype
    # Each value is a sum of `block` terms of the size of x, divided by the root of the block.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, wanted, atol=float(x.abs().max()) * block**0.5 * eps, rtol=0)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(HADAMARD_BLOCKS), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99))
def test_the_inverse_and_the_length(block: int, blocks: int, rows: int, seed: int) -> None:
    k = block * blocks
    x, signs = normal(rows, k, seed=seed), random_signs(k, seed)
    plain, signed = hadamard(x, block), hadamard(x, block, signs=signs)
    torch.testing.assert_close(hadamard(plain, block), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(inverse_hadamard(signed, block, signs=signs), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(signed.square().sum(-1), x.square().sum(-1), atol=0, rtol=1e-5)


def test_the_output_of_a_layer_stays() -> None:
    x, weight, signs = normal(7, 256).double(), normal(9, 256).double(), random_signs(256, 5)
    y = hadamard(x, 64, signs=signs) @ hadamard(weight, 64, signs=signs).T
    torch.testing.assert_close(y, x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    x, signs = normal(4, 128).to(dtype), random_signs(128, 1)
    y = hadamard(x, 128, signs=signs)
    assert torch.equal(y, hadamard(x.float(), 128, signs=signs).to(dtype))
    back = inverse_hadamard(y, 128, signs=signs)
    assert back.dtype is dtype
    assert torch.equal(back, (hadamard(y.float(), 128) * signs).to(dtype))


def test_signs_after_the_transform_would_be_a_no_op() -> None:
    operand, signs = Operand.parse("f4E2M1FN@block32:f8E8M0FNU"), random_signs(64, 0)
    x = normal(16, 64)

    def quantized(value: Tensor) -> Tensor:
        return dequantize(*quantize(value, operand), operand)

    after = quantized(hadamard(x, 32) * signs) * signs
    assert torch.equal(after, quantized(hadamard(x, 32)))
    before = inverse_hadamard(quantized(hadamard(x, 32, signs=signs)), 32, signs=signs)
    assert not torch.allclose(before, hadamard(quantized(hadamard(x, 32)), 32), atol=1e-2)


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(1, 128)
    x[0, 70] = 64.0
    assert torch.equal(hadamard(x, 64).abs()[0, 64:], torch.full((64,), 8.0))
    assert not hadamard(x, 64)[0, :64].any()


def test_random_signs_follow_the_seed() -> None:
    signs = random_signs(1000, 3)
    assert torch.equal(signs, random_signs(1000, 3))
    assert not torch.equal(signs, random_signs(1000, 4))
    assert torch.equal(signs.abs(), torch.ones(1000))
    assert abs(float(signs.sum())) < 150


@pytest.mark.parametrize(
    ("x", "block", "signs", "message"),
    [
        (torch.zeros(2, 48), 32, None, r"48 input channels .* block of 32; use a block of 16"),
        (torch.zeros(2, 40), 32, None, "do not rotate this layer"),
        (torch.zeros(2, 64), 24, None, "a Hadamard block of 24 values is not possible; sizes: 16"),
        (torch.zeros(2, 64), 32, torch.ones(32), r"64 input channels need as many signs"),
        (torch.zeros(2, 64, dtype=torch.int32), 32, None, "only floating-point tensors"),
        (torch.zeros(()), 32, None, "at least one axis"),
    ],
)
def test_refusals(x: Tensor, block: int, signs: Tensor | None, message: str) -> None:
    with pytest.raises(NumericsError, match=f"layer 'fc': .*{message}"):
        hadamard(x, block, signs=signs, layer="fc")
