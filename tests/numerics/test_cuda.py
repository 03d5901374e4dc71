"""The same bits on a GPU as on the CPU, and no waiting for it but to look for NaN."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import (
    decode,
    decode_packed,
    dequantize,
    encode,
    pack,
    quantize,
    quantize_packed,
    round_to,
    sqnr_db,
    unpack,
)
from fpcompiler.operand import Operand
from tests.numerics.test_scaling import OPERANDS, difficult, gaussian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, wherever they are."""
    return torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.cpu().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("spec", FORMATS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rounding(spec: FloatSpec, dtype: torch.dtype) -> None:
    x = torch.cat([difficult(24, 75).flatten(), gaussian(1 << 20) * spec.max / 4]).to(dtype)
    x = x[x.isfinite()]
    codes = encode(x, spec)
    assert same(encode(x.cuda(), spec), codes)
    assert same(round_to(x.cuda(), spec), round_to(x, spec))
    assert same(decode(codes.cuda(), spec), decode(codes, spec))
    packed = pack(codes, spec.storage_bits)
    assert same(pack(codes.cuda(), spec.storage_bits), packed)
    assert same(unpack(packed.cuda(), spec.storage_bits, len(codes)), codes)
    assert same(decode_packed(packed.cuda(), spec, len(codes)), decode(codes, spec))


@pytest.mark.parametrize("text", OPERANDS)
def test_quantize(text: str) -> None:
    operand = Operand.parse(text)
    for x in (difficult(24, 75), gaussian(300, 1024), gaussian(2, 3, 33).transpose(0, 2)):
        codes, scales = quantize(x, operand)
        got, got_scales = quantize(x.cuda(), operand)
        assert same(got, codes)
        assert all(map(same, got_scales, scales))
        assert same(dequantize(got, got_scales, operand), dequantize(codes, scales, operand))
        assert same(quantize_packed(x.cuda(), operand)[0], quantize_packed(x, operand)[0])


@pytest.mark.parametrize("text", OPERANDS)
def test_quantize_waits_once(text: str) -> None:
    operand, x = Operand.parse(text), gaussian(64, 256).cuda()
    codes, scales = quantize(x, operand)  # the first use copies tables to the GPU
    dequantize(codes, scales, operand)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            dequantize(*quantize(x, operand), operand)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [str(w.message) for w in waits if "synchronizing" in str(w.message)][1:] == []


def test_nan_is_refused() -> None:
    x = torch.tensor([1.0, float("nan")], device="cuda")
    with pytest.raises(NumericsError, match="layer 'a': input holds NaN/Inf"):
        quantize(x, Operand.parse(OPERANDS[0]), layer="a")


def test_metrics() -> None:
    x = gaussian(1000)
    assert sqnr_db(x.cuda(), x.cuda() + 1) == pytest.approx(sqnr_db(x, x + 1))
