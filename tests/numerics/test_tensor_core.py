"""The model of tensor cores against fractions, and worked numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics.tensor_core import (
    BLACKWELL_F8F6F4,
    BLACKWELL_MXF4,
    HOPPER_BF16,
    HOPPER_FP8,
    Factor,
    error_bound,
    tensor_core_gemm,
)
from tests.numerics import exact_tensor_core as exact

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E2M1, E4M3, E8M0 = FORMATS["f4E2M1FN"], FORMATS["f8E4M3FN"], FORMATS["f8E8M0FNU"]


def random_codes(rows: int, k: int, spec: FloatSpec, seed: int) -> Tensor:
    """Finite codes of any size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, spec.code_count, (rows, k), dtype=torch.uint8, generator=generator)
    finite = torch.tensor(spec.values).isfinite()
    return codes.masked_fill(~finite[codes.int()], 0)


def numbers(codes: Tensor, spec: FloatSpec) -> list[list[exact.Number]]:
    return [[exact.of_code(code, spec) for code in row] for row in codes.tolist()]


def repeated(row: list[exact.Number], block: int, k: int) -> list[exact.Number]:
    return [row[i // block] for i in range(k)]


def bits_of(result: Tensor) -> list[list[int]]:
    return result.cpu().view(torch.int32).tolist()


def as_fp32(rows: list[list[float]]) -> list[list[int]]:
    wide = torch.tensor(rows, dtype=torch.float64)
    assert torch.equal(wide.float().double(), wide)
    return bits_of(wide.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("instruction", [HOPPER_FP8, BLACKWELL_F8F6F4], ids=lambda i: i.name)
@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(["f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN", "f8E5M2"]),
    k=st.sampled_from([1, 31, 32, 33, 96]),
    seed=st.integers(0, 999),
)
def test_products_are_aligned_one_by_one(device, instruction, name, k, seed) -> None:
    spec = FORMATS[name]
    a, b = random_codes(2, k, spec, seed), random_codes(3, k, E4M3, seed + 1)
    result = tensor_core_gemm(
        Factor.of_codes(a.to(device), spec), Factor.of_codes(b.to(device), E4M3), instruction
    )
    ones = [(exact.ONE, exact.ONE)] * k
    expected = [
        [exact.dot(x, y, ones, 32, instruction.result_bits) for y in numbers(b, E4M3)]
        for x in numbers(a, spec)
    ]
    assert bits_of(result) == as_fp32(expected)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=15)
@given(
    k=st.sampled_from([1, 16, 40]), spread=st.sampled_from([0, 3, 30, 60]), seed=st.integers(0, 999)
)
def test_bf16_of_any_size(device: str, k: int, spread: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, k)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp2(torch.randint(-spread, spread + 1, shape, generator=generator).float())
    values = values.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).bfloat16()
    a, b = values[:2], values[2:]
    result = tensor_core_gemm(
        Factor.of_bf16(a.to(device)), Factor.of_bf16(b.to(device)), HOPPER_BF16
    )
    rows = [[exact.of_float(v) for v in row] for row in values.tolist()]
    ones = [(exact.ONE, exact.ONE)] * k
    expected = [[exact.dot(x, y, ones, 16, 23) for y in rows[2:]] for x in rows[:2]]
    assert bits_of(result) == as_fp32(expected)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(["f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN"]),
    k=st.sampled_from([32, 96]),
    spread=st.sampled_from([0, 3, 20]),
    seed=st.integers(0, 999),
)
def test_block_scales_shift_the_products(device, name: str, k: int, spread: int, seed: int) -> None:
    spec, generator = FORMATS[name], torch.Generator().manual_seed(seed)
    a, b = random_codes(2, k, spec, seed), random_codes(2, k, E2M1, seed + 1)
    scales = torch.randint(
        127 - spread, 128 + spread, (4, k // 32), dtype=torch.uint8, generator=generator
    )
    result = tensor_core_gemm(
        Factor.of_codes(a.to(device), spec, scales[:2].to(device), E8M0),
        Factor.of_codes(b.to(device), E2M1, scales[2:].to(device), E8M0),
        BLACKWELL_F8F6F4,
    )
    s = [repeated(row, 32, k) for row in numbers(scales, E8M0)]
    expected = [
        [
            exact.dot(x, y, list(zip(s[i], s[2 + j], strict=True)), 32, 23)
            for j, y in enumerate(numbers(b, E2M1))
        ]
        for i, x in enumerate(numbers(a, spec))
    ]
    assert bits_of(result) == as_fp32(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "block"), [("f8E4M3FN", 16), ("f8E8M0FNU", 32)])
@settings(deadline=None, max_examples=15)
@given(k=st.sampled_from([32, 64, 160]), seed=st.integers(0, 999))
def test_fp4_by_fp4(device: str, name: str, block: int, k: int, seed: int) -> None:
    kind = FORMATS[name]
    a, b = random_codes(2, k, E2M1, seed), random_codes(2, k, E2M1, seed + 1)
    scales = random_codes(4, k // block, kind, seed + 2)
    scales = scales % 40 + 107 if name == "f8E8M0FNU" else scales & 0x7F
    result = tensor_core_gemm(
        Factor.of_codes(a.to(device), E2M1, scales[:2].to(device), kind),
        Factor.of_codes(b.to(device), E2M1, scales[2:].to(device), kind),
        BLACKWELL_MXF4,
    )
    s = [repeated(row, block, k) for row in numbers(scales, kind)]
    expected = [
        [
            exact.dot_fp4(x, y, list(zip(s[i], s[2 + j], strict=True)))
            for j, y in enumerate(numbers(b, E2M1))
        ]
        for i, x in enumerate(numbers(a, E2M1))
    ]
    assert bits_of(result) == as_fp32(expected)


def bf16(*values: float) -> Factor:
    return Factor.of_bf16(torch.tensor([values], dtype=torch.bfloat16))


def e4m3(*values: float) -> Factor:
    codes = [E4M3.values.index(value) for value in values]
    return Factor.of_codes(torch.tensor([codes], dtype=torch.uint8), E4M3)


def test_what_13_fraction_bits_lose() -> None:
    # 448 * 448 = 1.53125 * 2**17, but its exponent is 8 + 8 = 16: the unit is 2**(16 - 13) = 8.
    ones = e4m3(448.0, *[1.0] * 20)
    seven = e4m3(448.0, *[7.0] * 20)
    eight = e4m3(448.0, *[8.0] * 20)
    assert tensor_core_gemm(ones, seven, HOPPER_FP8).item() == 448 * 448
    # The sum 200864 = 1.5325.. * 2**17 is then cut off at 2**(17 - 13) = 16.
    assert tensor_core_gemm(ones, eight, HOPPER_FP8).item() == 448 * 448 + 160
    assert tensor_core_gemm(ones, seven, BLACKWELL_F8F6F4).item() == 448 * 448 + 140


def test_the_exponent_of_a_subnormal_is_that_of_its_format() -> None:
    # 2**-9 of E4M3 is 0.125 * 2**-6. Times 448, 1.75 * 2**8, the unit is 2**(-6 + 8 - 13), and
    # 2**-12 is below. As a normal number, 1.0 * 2**-9, it would have left a unit of 2**-14.
    left, right = e4m3(2.0**-9, 2.0**-6), e4m3(448.0, 2.0**-6)
    assert tensor_core_gemm(left, right, HOPPER_FP8).item() == 0.875


def test_a_zero_takes_no_part() -> None:
    # Otherwise 0 * 448 would have the exponent -6 + 8, and the unit were 2**(2 - 13).
    left, right = e4m3(0.0, 2.0**-6), e4m3(448.0, 2.0**-6)
    assert tensor_core_gemm(left, right, HOPPER_FP8).item() == 2.0**-12


def test_bf16_keeps_25_bits_and_then_cuts_off_at_23() -> None:
    one, tiny = 1.0, 2.0**-24
    ones = bf16(*[one] * 3)
    # Two halves of a unit of the result make a whole one, since they are added before the cut.
    assert tensor_core_gemm(ones, bf16(one, tiny, tiny), HOPPER_BF16).item() == 1 + 2.0**-23
    assert tensor_core_gemm(ones, bf16(one, tiny, 0.0), HOPPER_BF16).item() == 1.0
    assert tensor_core_gemm(ones, bf16(one, -tiny, 0.0), HOPPER_BF16).item() == 1 - 2.0**-24
    # What is left when large terms cancel has been cut off at 2**-25.
    cancel = bf16(one, -one, 1.5 * 2.0**-25)
    assert tensor_core_gemm(ones, cancel, HOPPER_BF16).item() == 2.0**-25
    # One instruction adds 16 products; the next finds 1.0 in the accumulator.
    split = bf16(one, *[0.0] * 14, tiny, tiny)
    assert tensor_core_gemm(bf16(*[one] * 17), split, HOPPER_BF16).item() == 1.0


def test_fp4_by_fp4_keeps_35_bits() -> None:
    six, half = E2M1.values.index(6.0), E2M1.values.index(0.5)
    codes = [six] * 16 + [six | 8] * 16 + [half] * 3 + [0] * 29
    left = torch.tensor([codes], dtype=torch.uint8)
    right = left & 7
    scales = torch.tensor([[0x7E, 0x7E, 0x01, 0x01]], dtype=torch.uint8)
    factors = (Factor.of_codes(side, E2M1, scales, E4M3) for side in (left, right))
    # 448**2 aligns at 2**16, the unit is 2**(16 - 35); 16 * 36 of it come and go. What is left,
    # 3 * 0.25 * 2**-18, is one and a half units.
    assert tensor_core_gemm(*factors, BLACKWELL_MXF4).item() == 2.0**-19


@pytest.mark.parametrize("instruction", [HOPPER_FP8, BLACKWELL_F8F6F4], ids=lambda i: i.name)
@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN"]),
    k=st.sampled_from([1, 32, 512]),
    small=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_bound_holds(instruction, name: str, k: int, small: bool, seed: int) -> None:
    spec = FORMATS[name]
    a, b = random_codes(8, k, spec, seed), random_codes(8, k, E2M1, seed + 1)
    if small:  # significands below 1, which do not bound the unit
        a, b = a & 3, b & 9
    factors = Factor.of_codes(a, spec), Factor.of_codes(b, E2M1)
    result = tensor_core_gemm(*factors, instruction).double()
    error = (result - factors[0].values @ factors[1].values.T).abs()
    assert bool((error <= error_bound(*factors, instruction)).all())


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_codes(9, 64, E4M3, 0), random_codes(5, 64, E4M3, 1)
    factors = Factor.of_codes(a, E4M3), Factor.of_codes(b, E4M3)
    whole = tensor_core_gemm(*factors, HOPPER_FP8)
    monkeypatch.setattr("fpcompiler.numerics.scratch._CPU_CHUNK", 400)
    assert torch.equal(tensor_core_gemm(*factors, HOPPER_FP8), whole)


def test_what_it_refuses() -> None:
    nan = torch.full((1, 32), 0x7F, dtype=torch.uint8)
    with pytest.raises(NumericsError, match="finite numbers only"):
        Factor.of_codes(nan, E4M3)
    with pytest.raises(NumericsError, match=r"expected bf16 \[R, K\], not torch.float32"):
        Factor.of_bf16(torch.ones(1, 1))
    with pytest.raises(NumericsError, match=r"codes are uint8 \[R, K\]"):
        Factor.of_codes(torch.zeros(3, dtype=torch.uint8), E4M3)
    with pytest.raises(NumericsError, match="48 values cannot have 5 scales: pad K"):
        Factor.of_codes(nan[:, :1].expand(1, 48) * 0, E4M3, nan[:, :5] * 0, E8M0)
    with pytest.raises(NumericsError, match=r"scales \[1, 0\] do not fit codes 1 x 32"):
        Factor.of_codes(nan * 0, E4M3, nan[:, :0], E8M0)
    with pytest.raises(NumericsError, match="K differs"):
        tensor_core_gemm(bf16(1.0), bf16(1.0, 2.0), HOPPER_BF16)
    twelve = Factor.of_codes(nan[:, :24] * 0, E2M1, nan[:, :2] * 0, E8M0)
    with pytest.raises(NumericsError, match="blocks of 12 values do not fit mxf4"):
        tensor_core_gemm(twelve, twelve, BLACKWELL_MXF4)
    with pytest.raises(NumericsError, match="a sum is beyond fp32"):
        tensor_core_gemm(bf16(2.0**100), bf16(2.0**100), HOPPER_BF16)


def test_a_sum_that_was_beyond_fp32_stays_refused() -> None:
    large = bf16(2.0**127, *[0.0] * 15, 2.0**127)
    sign = bf16(2.0, *[0.0] * 15, -2.0)
    with pytest.raises(NumericsError, match="a sum is beyond fp32"):
        tensor_core_gemm(large, sign, HOPPER_BF16)
