"""GPTQ, rotation, smoothing and pre-shifts on a GPU: what they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.formats import parse_format
from fpcompiler.numerics import dequantize
from fpcompiler.numerics.gptq import gptq, output_error
from fpcompiler.numerics.hadamard import hadamard, inverse_hadamard, random_signs
from fpcompiler.numerics.preshift import ShiftRounding, fold, preshift
from fpcompiler.numerics.shift_lowering import bucket_permutation, container
from fpcompiler.numerics.shift_search import search_rho
from fpcompiler.numerics.smooth import smooth_scales
from fpcompiler.operand import Operand
from tests.models import normal
from tests.numerics.test_gptq import OPERANDS, hessian_of, inputs
from tests.numerics.test_preshift import E2M1, uneven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("text", OPERANDS)
def test_gptq(text: str) -> None:
    operand, weight, hessian = Operand.parse(text), normal(64, 148), hessian_of(inputs(300, 148))
    codes, scales = gptq(weight, hessian, operand)
    got, got_scales = gptq(weight.cuda(), hessian.cuda(), operand)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got_scales, scales, strict=True))
    # Sums in another order may move a value across the middle between two codes.
    assert float((got.cpu() == codes).float().mean()) > 0.999
    errors = [
        output_error(weight, dequantize(c.cpu(), scales, operand), hessian).sum()
        for c in (got, codes)
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0)


def test_hadamard_and_smoothing() -> None:
    x, signs = normal(9, 256), random_signs(256, 0)
    y = hadamard(x.cuda(), 64, signs=signs)
    torch.testing.assert_close(y.cpu(), hadamard(x, 64, signs=signs), atol=1e-5, rtol=0)
    back = inverse_hadamard(y, 64, signs=signs)
    torch.testing.assert_close(back.cpu(), x, atol=1e-5, rtol=0)
    amax = x.abs().amax(0)
    powers = smooth_scales(amax.cuda(), [x.cuda() * 3], power_of_two=True)
    assert torch.equal(powers.cpu(), smooth_scales(amax, [x * 3], power_of_two=True))


@pytest.mark.parametrize("rounding", ShiftRounding)
def test_preshift(rounding: ShiftRounding) -> None:
    x, weight = uneven(500, 300), normal(64, 300)
    shift = preshift(x.abs().amax(0), E2M1, rounding=rounding)
    got = preshift(x.cuda().abs().amax(0), E2M1, rounding=rounding)
    assert torch.equal(got.exponents.cpu(), shift.exponents)
    assert torch.equal(got.quantize(x.cuda()).cpu(), shift.quantize(x))
    folded = fold(weight.cuda(), got.exponents)
    assert torch.equal(folded.cpu(), fold(weight, shift.exponents))
    found = search_rho(x.cuda(), [weight.cuda()], [E2M1], rounding=rounding)
    assert found.qmax == search_rho(x, [weight], [E2M1], rounding=rounding).qmax


@pytest.mark.parametrize("most", [None, 2])
def test_lowering(most: int | None) -> None:
    exponents = torch.arange(300, dtype=torch.int32) * 5 % 4
    buckets = bucket_permutation(exponents, max_buckets=most)
    got = bucket_permutation(exponents.cuda(), max_buckets=most)
    assert torch.equal(got.order.cpu(), buckets.order)
    assert torch.equal(got.scale_codes.cpu(), buckets.scale_codes)
    codes = torch.arange(300).to(torch.uint8) % 16
    assert torch.equal(got.permute(codes.cuda()).cpu(), buckets.permute(codes))
    held = container(E2M1, 3, [parse_format("e3m2")])
    assert torch.equal(held.fold(codes.cuda(), exponents.cuda()).cpu(), held.fold(codes, exponents))
