"""Forms in which kernels read activations: what they hold, and that torch and kernels agree."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, quantize
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.form import (
    CudaInput,
    InputKind,
    check_held,
    code_table,
    factor_of,
    input_of_codes,
)
from fpcompiler.runtime.cuda.quantizers import QuantizeKernels, problem_of
from fpcompiler.runtime.cuda.stored import BF16, I8, integer_shift, why_not
from tests.numerics.test_scaling import difficult
from tests.runtime.cuda.host_kernels import host_quantizers, operators

CPU = torch.device("cpu")
ELEMENTS = [spec for spec in FORMATS.values() if spec.zero and spec.signed]
KINDS = [
    InputKind(Operand.parse(text), k, element)
    for text, element in (
        ("f6E2M3FN@token:f32", I8),
        ("f4E2M1FN@token:f32", I8),
        ("f4E1M2FN@token:f32", I8),
        ("f8E1M6FN@token:f32", I8),
        ("f6E2M3FN@block32:f8E8M0FNU", BF16),
        ("f6E3M2FN@token:f32/block32:f8E8M0FNU", BF16),
        ("f4E2M1FN@tensor:f32/block16:f8E4M3FN", BF16),
        ("f8E4M3FN@token:f32", BF16),
        ("f6E2M3FN@token:f32", "f8E4M3FN"),
    )
    for k in (256, 200)
]


def by_torch(kind: InputKind, x: Tensor) -> CudaInput:
    codes, scales = quantize(x, kind.operand)
    table = code_table(kind.operand.format, kind.element, CPU)
    return input_of_codes(kind, [codes, *scales], table)


def values_of(found: CudaInput) -> Tensor:
    """Return what the bytes stand for without real scales, fp64 ``[rows, padded_k]``."""
    kind = found.kind
    if kind.element == BF16:
        return found.codes.view(torch.bfloat16).double()
    if kind.element == I8:
        values = found.codes.view(torch.int8).double()
    else:
        values = decode(found.codes, FORMATS[kind.element]).double()
    return values * factor_of(kind.operand.format, kind.element)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bytes_stand_for_the_values_of_numerics(kind: InputKind) -> None:
    x = difficult(24, kind.k)[:6]
    found = by_torch(kind, x)
    codes, scales = quantize(x, kind.operand)
    expected = decode(codes, kind.operand.format).double()
    if kind.operand.block:
        inner = decode(scales[-1], FORMATS[kind.operand.block.format]).double()
        expected *= inner.repeat_interleave(kind.operand.block.block, dim=-1)[:, : kind.k]
    assert found.codes.shape == (6, kind.row_bytes)
    values = values_of(found)
    assert torch.equal(values[:, : kind.k], expected)
    assert not values[:, kind.k :].any()
    if kind.element == I8:
        assert found.token_scale is not None
        sums = found.token_scale[6:].view(torch.int32)
        assert torch.equal(sums.long(), found.codes.view(torch.int8).long().sum(-1))
        assert torch.equal(found.token_scale[:6], scales[0].view(-1))
    assert (found.block_scale is None) == (kind.block_scale_bytes(6) == 0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_kernels_and_torch_give_the_same_input(tmp_path: Path) -> None:
    operators()
    types = ("f32", "", "", "", "")
    problems = [problem_of(kind, "", types) for kind in KINDS]
    unique = list(dict.fromkeys(problem for problem in problems if problem))
    assert {problem.stored for problem in unique} == {kind.element for kind in KINDS}
    kernels = QuantizeKernels.of([host_quantizers(unique, tmp_path / "quantize.so")])
    for kind in KINDS:
        # Without rows a kernel has nothing to write a scale of the tensor from.
        for rows in (5, 1) if kind.has_tensor_scale else (5, 1, 0):
            x = difficult(24, kind.k)[:rows]
            status = torch.zeros(1, dtype=torch.int32)
            found = kernels.quantize(kind, x, status)
            assert found is not None, str(kind)
            assert_same(found, by_torch(kind, x))


def assert_same(found: CudaInput, expected: CudaInput) -> None:
    assert found[:3] == expected[:3]
    for a, b in zip(found[3:], expected[3:], strict=True):
        assert (a is None) == (b is None)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_sizes_of_rows_and_scales() -> None:
    token = Operand.parse("f6E2M3FN@token:f32")
    integers, packed = InputKind(token, 200, I8), InputKind(token, 200, "f6E2M3FN")
    assert (integers.row_bytes, integers.outer_count(7)) == (256, 14)
    assert (packed.row_bytes, packed.outer_count(7)) == (192, 7)
    mx = Operand.parse("f6E2M3FN@block32:f8E8M0FNU")
    products, codes = InputKind(mx, 200, BF16), InputKind(mx, 200, "f6E2M3FN")
    assert (products.row_bytes, products.block_scale_bytes(7), products.scale_pitch) == (512, 0, 0)
    assert (codes.block_scale_bytes(7), codes.scale_pitch, codes.outer_count(7)) == (1024, 8, 0)
    shared = InputKind(Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN"), 200, BF16)
    assert shared.outer_count(7) == 1


@pytest.mark.parametrize("spec", ELEMENTS, ids=str)
def test_integers_are_all_numbers_times_the_least_power(spec: FloatSpec) -> None:
    numbers = [value for value in spec.values if abs(value) <= spec.max]
    shift = integer_shift(spec)
    assert all((value * 2.0**shift).is_integer() for value in numbers)
    assert not all((value * 2.0 ** (shift - 1)).is_integer() for value in numbers)
    operand = Operand.parse(f"{spec}@token:f32")
    fits = max(numbers) * 2.0**shift <= 127
    assert (why_not(operand, I8) == "") == fits
    if fits:
        check_held(operand, I8)
        assert factor_of(spec, I8) == 2.0**-shift
    else:
        with pytest.raises(NumericsError, match="and no int8"):
            check_held(operand, I8)


@pytest.mark.parametrize("scale", ["block32:f8E8M0FNU", "block16:f8E4M3FN"])
@pytest.mark.parametrize("spec", ELEMENTS, ids=str)
def test_products_are_exact_in_bf16_where_they_are_said_to_be(spec: FloatSpec, scale: str) -> None:
    operand = Operand.parse(f"{spec}@{scale}")
    assert operand.block
    numbers = torch.tensor([v for v in spec.values if abs(v) <= spec.max]).double()
    scales = torch.tensor(FORMATS[operand.block.format].values).double()
    usual = (scales >= 2.0**-116) & (scales < 2.0**111)
    products = numbers[:, None] * scales[usual]
    exact = torch.equal(products.to(torch.bfloat16).double(), products)
    assert (why_not(operand, BF16) == "") == exact


def test_forms_of_integers_are_for_scales_of_tokens() -> None:
    for text in ("f6E2M3FN@tensor:f32", "f6E2M3FN", "f6E2M3FN@token:f32/block32:f8E8M0FNU"):
        with pytest.raises(NumericsError, match="one scale per token, without blocks"):
            check_held(Operand.parse(text), I8)
    with pytest.raises(NumericsError, match="products with real scales"):
        check_held(Operand.parse("f6E2M3FN@block32:f32"), BF16)


def test_other_containers_have_factors_of_their_own() -> None:
    assert factor_of(FORMATS["f4E2M1FN"], "f8E4M3FN") == 1
    assert factor_of(FORMATS["f6E2M3FN"], "f6E2M3FN") == 1
    assert factor_of(FORMATS["f4E2M1FN"], BF16) == 1
    assert factor_of(FORMATS["f4E3M0FN"], "f6E3M2FN") in (1, 0.5, 2)
    with pytest.raises(NumericsError):
        factor_of(FORMATS["f6E1M4FN"], "f8E4M3FN")
