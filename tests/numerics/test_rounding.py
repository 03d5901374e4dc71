"""Rounding, encoding and decoding against ml_dtypes and against exact fractions."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, encode, round_to
from tests.numerics.oracle import ML_DTYPES, magnitudes, nearest_code

ALL = pytest.mark.parametrize("spec", FORMATS.values(), ids=str)
TWINS = pytest.mark.parametrize("name", ML_DTYPES)


def twin(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, ML_DTYPES[name]))


def special_values(spec: FloatSpec) -> np.ndarray:
    """Every value, every midpoint, and the fp32 numbers next to them, with both signs."""
    values = np.array(magnitudes(spec))
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    up, down = (np.nextafter(exact, np.float32(to)) for to in (np.inf, -np.inf))
    x = np.unique(np.concatenate([exact, up, down]))
    x = x[(x >= 0) & (x <= spec.max)]
    return np.concatenate([x, -x]) if spec.signed else x


def random_values(spec: FloatSpec, count: int) -> np.ndarray:
    """Half of them spread evenly over the range, half over its binary logarithm."""
    rng = np.random.default_rng(0)
    linear = rng.uniform(0, spec.max, count // 2)
    bottom = math.log2(spec.smallest) - (2 if spec.zero else 0)
    x = np.concatenate([linear, 2.0 ** rng.uniform(bottom, math.log2(spec.max), count // 2)])
    x = np.minimum(x.astype(np.float32), np.float32(spec.max))
    return x * rng.choice(np.float32([-1, 1]), count) if spec.signed else x


def in_range_of_ml_dtypes(x: np.ndarray, name: str) -> np.ndarray:
    # ml_dtypes 0.6 rounds an fp32 subnormal in (2**-127, 1.5 * 2**-127) up to 2**-126.
    return x[x >= 2.0**-126] if name == "f8E8M0FNU" else x


@TWINS
def test_every_code_decodes_like_ml_dtypes(name: str) -> None:
    codes = np.arange(FORMATS[name].code_count, dtype=np.uint8)
    expected = codes.view(twin(name)).astype(np.float32)
    got = decode(torch.from_numpy(codes), FORMATS[name]).numpy()
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(expected[expected == 0]))


@TWINS
@pytest.mark.parametrize("kind", ["special", "random"])
def test_rounding_equals_ml_dtypes(name: str, kind: str) -> None:
    spec = FORMATS[name]
    x = special_values(spec) if kind == "special" else random_values(spec, 1_000_000)
    x = in_range_of_ml_dtypes(x, name)
    expected = x.astype(twin(name))
    np.testing.assert_array_equal(encode(torch.from_numpy(x), spec), expected.view(np.uint8))
    rounded = round_to(torch.from_numpy(x), spec).numpy()
    np.testing.assert_array_equal(
        rounded.view(np.int32), expected.astype(np.float32).view(np.int32)
    )


@ALL
def test_rounding_equals_exact_fractions(spec: FloatSpec) -> None:
    x = np.concatenate([special_values(spec), random_values(spec, 2000), [0.0, 1e-40, 3e38]])
    expected = [nearest_code(float(v), spec) for v in x.astype(np.float32)]
    codes = encode(torch.from_numpy(x.astype(np.float32)), spec)
    np.testing.assert_array_equal(codes, expected)


@ALL
def test_fp64_is_rounded_once(spec: FloatSpec) -> None:
    middle = (np.array(magnitudes(spec)[1:]) + np.array(magnitudes(spec)[:-1])) / 2
    x = np.concatenate([middle * (1 + 2.0**-50), middle * (1 - 2.0**-50)])
    got = round_to(torch.from_numpy(x), spec)
    assert got.dtype == torch.float64
    assert got.tolist() == [spec.value(nearest_code(v, spec)) for v in x]


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(spec: FloatSpec, dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()]
    rounded = round_to(x, spec)
    assert rounded.dtype == torch.float32
    # Every value of a format is a number of fp64, in which the distances are exact.
    table = torch.tensor(magnitudes(spec), dtype=torch.float64)
    size = x.double().abs() if spec.signed else x.double().clamp(min=0)
    best = (size.clamp(max=spec.max)[:, None] - table).abs().amin(1)
    got = rounded.double().abs()
    torch.testing.assert_close((size.clamp(max=spec.max) - got).abs(), best, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [s for s in FORMATS.values() if s.zero], ids=str)
def test_where_the_exponent_of_bfloat16_is_too_large(spec: FloatSpec) -> None:
    top = torch.arange(0xFF_0000, 0x100_0000, 13, dtype=torch.float32) / 2**24
    for exponent in range(spec.min_exponent - 1, spec.max_exponent + 1):
        x = top * 2.0 ** (exponent + 1)
        codes = encode(x, spec)
        expected = [nearest_code(float(v), spec) for v in x[::251]]
        assert codes[::251].tolist() == expected
        assert bool((codes[1:] >= codes[:-1]).all())


@ALL
def test_encode_inverts_decode(spec: FloatSpec) -> None:
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    values = decode(codes, spec)
    finite = values.isfinite()
    assert torch.equal(encode(values[finite], spec), codes[finite])
    assert torch.equal(round_to(values[finite], spec), values[finite])


@ALL
def test_beyond_the_range(spec: FloatSpec) -> None:
    x = torch.tensor([math.inf, 3.4e38, -math.inf, -3.4e38])
    least = -spec.max if spec.signed else (0.0 if spec.zero else spec.smallest)
    assert round_to(x, spec).tolist() == [spec.max, spec.max, least, least]


@ALL
def test_nan(spec: FloatSpec) -> None:
    x = torch.tensor([1.0, math.nan])
    assert round_to(x, spec).isnan().tolist() == [False, True]
    if spec.nan_code is None:
        with pytest.raises(NumericsError, match=f"{spec.name} has no NaN"):
            encode(x, spec)
    else:
        assert math.isnan(spec.value(int(encode(x, spec)[1])))


def test_zeros_and_what_rounds_to_zero_keep_their_sign() -> None:
    x = torch.tensor([0.0, -0.0, 0.1, -0.1, -1e-40])
    spec = FORMATS["f4E2M1FN"]
    assert encode(x, spec).tolist() == [0, 8, 0, 8, 8]
    assert round_to(x, spec).signbit().tolist() == [False, True, False, True, True]


def test_worked_ties_of_e2m1() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7])
    assert round_to(x, FORMATS["f4E2M1FN"]).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@ALL
def test_shapes_and_strides(spec: FloatSpec) -> None:
    x = torch.linspace(-8, 8, 6 * 10).view(6, 10)
    for view in (x.t(), x[:, ::3], x[1:1], x[0, 0], x.expand(2, 6, 10)):
        assert torch.equal(encode(view, spec), encode(view.contiguous().clone(), spec))
        assert round_to(view, spec).shape == view.shape
        assert decode(encode(view, spec), spec).shape == view.shape


def test_inputs_are_left_alone() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = x.detach().clone()
    for spec in FORMATS.values():
        encode(x, spec)
        assert not round_to(x, spec).requires_grad
    assert torch.equal(x.detach(), before)


def test_chunks_do_not_show() -> None:
    x = torch.randn(700_001, generator=torch.Generator().manual_seed(0))
    spec = FORMATS["f6E3M2FN"]
    pieces = torch.cat([encode(piece, spec) for piece in x.split(1000)])
    assert torch.equal(encode(x, spec), pieces)
    assert torch.equal(round_to(x, spec), decode(pieces, spec))


def test_integers_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"not torch\.int64"):
        round_to(torch.arange(3), FORMATS["f4E2M1FN"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_decode_to_a_dtype(dtype: torch.dtype) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode(codes, FORMATS["f4E2M1FN"], dtype)
    assert values.dtype == dtype
    assert values.tolist() == list(FORMATS["f4E2M1FN"].values)
