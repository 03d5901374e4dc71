"""Properties that hold for all values, looked for by hypothesis."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

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
    unpack,
)
from fpcompiler.operand import (
    BLOCK_SIZES,
    SCALE_FORMATS,
    Granularity,
    Operand,
    ScaleLevel,
    ScaleRounding,
)

fast = settings(deadline=None, max_examples=60)

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-1000, 1000, width=32)
signed_formats = st.sampled_from([s for s in FORMATS.values() if s.signed])
formats = st.sampled_from(list(FORMATS.values()))


@st.composite
def operands(draw: st.DrawFn) -> Operand:
    """Any operand at all."""
    coarse = draw(st.sampled_from([None, "tensor", "row", "token"]))
    levels = [ScaleLevel(Granularity(coarse))] if coarse else []
    if draw(st.booleans()):
        name = draw(st.sampled_from(SCALE_FORMATS[1:] if levels else SCALE_FORMATS))
        modes = list(ScaleRounding) if name != "f32" else [ScaleRounding.RNE]
        block, mode = draw(st.sampled_from(BLOCK_SIZES)), draw(st.sampled_from(modes))
        levels.append(ScaleLevel(Granularity.BLOCK, name, block, mode))
    return Operand(draw(signed_formats), tuple(levels))


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 70))
    return hnp.arrays(np.float32, shapes, elements=elements).map(torch.from_numpy)


@fast
@given(formats, st.lists(numbers, min_size=1))
def test_round_is_idempotent(spec: FloatSpec, values: list[float]) -> None:
    once = round_to(torch.tensor(values), spec)
    assert torch.equal(round_to(once, spec), once)


@fast
@given(formats, st.lists(numbers, min_size=2))
def test_round_is_monotone(spec: FloatSpec, values: list[float]) -> None:
    rounded = round_to(torch.tensor(sorted(values)), spec)
    assert bool((rounded[1:] >= rounded[:-1]).all())


@fast
@given(signed_formats, st.lists(numbers, min_size=1))
def test_round_is_odd(spec: FloatSpec, values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(round_to(-x, spec).view(torch.int32), (-round_to(x, spec)).view(torch.int32))


@fast
@given(formats, st.lists(numbers, min_size=1))
def test_decode_of_encode_is_round(spec: FloatSpec, values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(decode(encode(x, spec), spec), round_to(x, spec))


@fast
@given(
    st.sampled_from([4, 6, 8]),
    hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.integers(0, 40))),
)
def test_unpack_inverts_pack(bits: int, array: np.ndarray) -> None:
    codes = torch.from_numpy(array) & ((1 << bits) - 1)
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[-1]), codes)


@fast
@given(operands())
def test_operand_text_round_trip(operand: Operand) -> None:
    assert Operand.parse(str(operand)) == operand


@fast
@given(operands(), matrices(numbers))
def test_any_values_can_be_quantized(operand: Operand, x: Tensor) -> None:
    codes, scales = quantize(x, operand)
    packed, same = quantize_packed(x, operand)
    spec, k = operand.format, x.shape[-1]
    assert all(map(torch.equal, scales, same))
    assert torch.equal(unpack(packed, spec.storage_bits, k), codes)
    assert torch.equal(decode_packed(packed, spec, k), decode(codes, spec))
    assert not dequantize(codes, scales, operand).isnan().any()


@fast
@given(operands(), matrices(moderate), st.integers(-40, 40))
def test_quantize_is_equivariant_under_powers_of_two(
    operand: Operand, x: Tensor, power: int
) -> None:
    # What has no real level cannot follow: E4M3 and no scale at all have a small range.
    if not operand.levels or operand.levels[0].format == "f8E4M3FN":
        return
    # Far below the largest value the bounds of the scales show, and subnormal numbers.
    x = torch.where(x.abs() < 1e-3, 0.0, x)
    codes, scales = quantize(x, operand)
    moved_codes, moved_scales = quantize(x * 2.0**power, operand)
    assert torch.equal(codes, moved_codes)
    moved = dequantize(moved_codes, moved_scales, operand)
    assert torch.equal(dequantize(codes, scales, operand) * 2.0**power, moved)


@fast
@given(operands(), matrices(moderate))
def test_quantize_is_odd(operand: Operand, x: Tensor) -> None:
    codes, scales = quantize(x, operand)
    negated, same = quantize(-x, operand)
    assert torch.equal(negated, codes ^ (1 << operand.format.magnitude_bits))
    assert all(map(torch.equal, scales, same))


@fast
@given(signed_formats, st.sampled_from(["", "row:f32/"]), matrices(moderate))
def test_mse_is_the_best_scale_of_each_block(spec: FloatSpec, outer: str, x: Tensor) -> None:
    def errors(mode: str, kind: str) -> Tensor:
        operand = Operand.parse(f"{spec}@{outer}block16:{kind}:{mode}")
        value = dequantize(*quantize(x, operand), operand)
        squares = (value.double() - x.double()).square()
        return (
            torch.nn.functional.pad(squares, (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16)).sum(-1)
        )

    for kind in ("f8E8M0FNU", "f8E4M3FN"):
        best = errors("mse", kind)
        # The choice is made in units of the scale; the rounded products differ from it by 2**-24.
        slack = 1e-5 * best + 1e-6 * x.double().square().sum()
        for mode in ("floor", "ceil", "rne"):
            assert bool((best <= errors(mode, kind) + slack.max()).all())


@fast
@given(signed_formats, matrices(numbers))
def test_a_real_scale_keeps_the_largest_value(spec: FloatSpec, x: Tensor) -> None:
    operand = Operand.parse(f"{spec}@row:f32")
    codes, _ = quantize(x, operand)
    largest = x.abs().amax(-1)
    top = decode(codes, spec).abs().amax(-1)
    assert bool((top[largest > spec.max * 2.0**-126] == spec.max).all())


@fast
@given(operands(), matrices(moderate))
def test_error_is_at_most_half_a_step(operand: Operand, x: Tensor) -> None:
    """Scales that clip nothing leave at most half of the largest step of the format."""
    block = operand.block
    if not operand.levels or (
        block and not block.is_real and block.rounding is not ScaleRounding.CEIL
    ):
        return
    if block and block.format == "f8E4M3FN" and not operand.outer:
        return
    spec = operand.format
    value = dequantize(*quantize(x, operand), operand)
    step = math.ldexp(1.0, spec.max_exponent - spec.mantissa_bits)
    factor = 2 if block and block.format == "f8E8M0FNU" else 9 / 8
    # Scales are at least 2**-126, which is more than the values of a tiny tensor need.
    bound = x.abs().max().clamp(min=1e-30) / spec.max * step / 2 * factor
    assert bool(((value - x).abs() <= bound * (1 + 1e-5)).all())
