"""NVFP4 written a second time from its definition, in numpy, and compared bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from fpcompiler.numerics import dequantize, pack, quantize
from fpcompiler.operand import Operand

NVFP4 = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")


def nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Quantize ``[R, K]`` fp32, K a multiple of 16.

    The tensor scale brings the largest value to 6 * 448; a block scale is ``amax / 6`` in units of
    it, rounded to E4M3; two values share a byte, the first in the low nibble.
    """
    tensor_scale = np.float32(np.abs(x).max() / np.float32(6 * 448))
    blocks = x.reshape(x.shape[0], -1, 16)
    amax = np.abs(blocks).max(-1)
    scale = (amax / (np.float32(6) * tensor_scale)).astype(ml_dtypes.float8_e4m3fn)
    total = (tensor_scale * scale.astype(np.float32))[..., None]
    quotient = np.clip(blocks / total, -6, 6)
    codes = quotient.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(x.shape)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale.view(np.uint8), tensor_scale


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_equals_numpy(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 256)) * np.exp2(rng.uniform(-spread / 8, spread / 8, (64, 256)))
    x = x.astype(np.float32) * np.float32(spread)
    packed, block_scale, tensor_scale = nvfp4(x)
    codes, (outer, inner) = quantize(torch.from_numpy(x), NVFP4)
    assert outer.item() == tensor_scale
    np.testing.assert_array_equal(inner, block_scale)
    np.testing.assert_array_equal(pack(codes, 4), packed)


def test_values_equal_numpy() -> None:
    x = np.random.default_rng(9).standard_normal((32, 64)).astype(np.float32)
    packed, block_scale, tensor_scale = nvfp4(x)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(x.shape)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    total = tensor_scale * block_scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = values * np.repeat(total, 16, -1)
    got = dequantize(*quantize(torch.from_numpy(x), NVFP4), NVFP4)
    np.testing.assert_array_equal(got, expected)
