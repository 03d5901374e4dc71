"""Weights in fragments are the weights: decoded as kernels do it, against dequantizing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpcompiler.numerics import decode, dequantize, pack, quantize
from fpcompiler.numerics.fragment_layout import codes_of_fragments
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.fragments import Mode, fragment_weights
from fpcompiler.runtime.cuda.weights import KernelWeights

N, K = 37, 200
CASES = [
    ("f4E2M1FN@row:f32", Mode.INTEGERS),
    ("f4E1M2FN@row:f32", Mode.INTEGERS),
    ("f4E2M1FN@row:f32", Mode.E4M3),
    ("f4E2M1FN@tensor:f32", Mode.E4M3),
    ("f4E2M1FN@row:f32", Mode.BF16),
    ("f4E2M1FN@row:f32/block32:f8E8M0FNU", Mode.BF16),
    ("f4E2M1FN@block32:f8E8M0FNU", Mode.BF16),
    ("f4E2M1FN@tensor:f32/block16:f8E4M3FN", Mode.BF16),
]


@pytest.mark.parametrize(("text", "mode"), CASES)
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_kernels_read_the_values(text: str, mode: Mode, spread: float) -> None:
    operand = Operand.parse(text)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp2(spread * torch.randn(N, K, generator=generator))
    weight = torch.randn(N, K, generator=generator) * sizes
    weight[3] = 0.0
    codes, scales = quantize(weight, operand)
    stored = fragment_weights([pack(codes, 4), *scales], operand, K, mode)
    assert stored.padded == 48
    assert stored.outputs == N
    found = values_of(stored, operand, mode, K)
    expected = dequantize(codes, scales, operand, torch.float64)
    # Real scales are multiplied in fp32 there and in fp64 here.
    assert torch.allclose(found, expected, rtol=2.0**-22, atol=0)


def values_of(stored: KernelWeights, operand: Operand, mode: Mode, k: int) -> Tensor:
    """Return what kernels multiply by, with all factors."""
    codes = codes_of_fragments(stored.codes, mode.order, stored.outputs, k)
    values = decode(codes, operand.format).double()
    if mode is Mode.INTEGERS:
        values = (values / stored.alpha).round() if operand.outer else values
        assert float(values.abs().max()) < 64
    if stored.scales is not None and operand.block is not None:
        each = 128 // operand.block.block
        rows = stored.scales.permute(0, 2, 1, 3).reshape(stored.padded, -1)
        assert stored.scales.shape[-1] == each
        bits = rows.to(torch.int64)
        bits = bits << 7 if operand.block.block == 32 else bits * 16 + 0x7200
        factors = (bits << 16).to(torch.int32).view(torch.float32).double() * 2.0**-126
        values *= factors[: stored.outputs].repeat_interleave(operand.block.block, 1)[:, :k]
    values *= stored.alpha
    return values if stored.row is None else values * stored.row.double().view(-1, 1)
