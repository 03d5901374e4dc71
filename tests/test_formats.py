"""The format table against numbers from the standards and papers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from fpcompiler.errors import FormatError, FpcompilerError
from fpcompiler.formats import FORMATS, FloatSpec, Specials, parse_format

ALL = pytest.mark.parametrize("spec", FORMATS.values(), ids=str)

#           name         short    bits max       smallest   normal  codes NaN
FACTS = [
    ("f4E2M1FN", "E2M1", 4, 6.0, 0.5, 0, 16, None),
    ("f4E1M2FN", "E1M2", 4, 3.5, 0.5, 1, 16, None),
    ("f4E3M0FN", "E3M0", 4, 16.0, 0.25, -2, 16, None),
    ("f6E2M3FN", "E2M3", 6, 7.5, 0.125, 0, 64, None),
    ("f6E3M2FN", "E3M2", 6, 28.0, 0.0625, -2, 64, None),
    ("f6E1M4FN", "E1M4", 6, 3.875, 0.125, 1, 64, None),
    ("f6E4M1FN", "E4M1", 6, 384.0, 2**-7, -6, 64, None),
    ("f6E5M0FN", "E5M0", 6, 2.0**16, 2**-14, -14, 64, None),
    ("f8E3M4", "E3M4", 8, 15.5, 2**-6, -2, 256, 0x78),
    ("f8E3M4FN", "E3M4", 8, 31.0, 2**-6, -2, 256, None),
    ("f8E1M6FN", "E1M6", 8, 3.96875, 2**-5, 1, 256, None),
    ("f8E2M5FN", "E2M5", 8, 7.875, 2**-5, 0, 256, None),
    ("f8E4M3FN", "E4M3", 8, 448.0, 2**-9, -6, 256, 0x7F),
    ("f8E5M2", "E5M2", 8, 57344.0, 2**-16, -14, 256, 0x7E),
    ("f8E8M0FNU", "E8M0", 8, 2.0**127, 2**-127, -127, 256, 0xFF),
    ("f8E4M3FNU", "UE4M3", 8, 448.0, 2**-9, -6, 128, 0x7F),
]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact[0])
def test_facts(fact: tuple[str, str, int, float, float, int, int, int | None]) -> None:
    spec = FORMATS[fact[0]]
    assert fact[1:] == (
        spec.short,
        spec.storage_bits,
        spec.max,
        spec.smallest,
        spec.min_exponent,
        spec.code_count,
        spec.nan_code,
    )


def test_the_facts_cover_the_table() -> None:
    assert [fact[0] for fact in FACTS] == list(FORMATS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("f4E2M1FN", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("f4E1M2FN", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ("f4E3M0FN", [v / 8 for v in (0, 2, 4, 8, 16, 32, 64, 128)]),
        (
            "f6E3M2FN",
            # the grid of bias 0, which is 8 times this one
            [v / 8 for v in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)]
            + [v / 8 for v in (28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224)],
        ),
        (
            "f6E2M3FN",
            [i / 8 for i in range(16)]
            + [2 + i / 4 for i in range(8)]
            + [4 + i / 2 for i in range(8)],
        ),
    ],
)
def test_value_tables(name: str, values: list[float]) -> None:
    assert list(FORMATS[name].values[: len(values)]) == values
    assert list(FORMATS[name].values[len(values) :]) == [-v for v in values]


@pytest.mark.parametrize(
    ("name", "largest"), [("f4E1M2FN", 7), ("f6E1M4FN", 31), ("f8E1M6FN", 127)]
)
def test_with_one_exponent_bit_the_values_are_integers_times_a_step(
    name: str, largest: int
) -> None:
    spec = FORMATS[name]
    steps = [value / spec.smallest for value in spec.values]
    assert steps == [*range(largest + 1), *(-n for n in range(largest + 1))]


@pytest.mark.parametrize("name", ["f6E5M0FN", "f4E3M0FN"])
def test_without_mantissa_bits_the_values_are_powers_of_two(name: str) -> None:
    spec = FORMATS[name]
    powers = range(spec.min_exponent, spec.max_exponent + 1)
    assert list(spec.values[: spec.max_code + 1]) == [0.0, *(2.0**power for power in powers)]


@ALL
def test_magnitudes_grow_with_the_code(spec: FloatSpec) -> None:
    values = [spec.value(code) for code in range(spec.max_code + 1)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[-1] == spec.max
    assert values[0] == (0.0 if spec.zero else spec.smallest)
    assert spec.max_exponent == math.floor(math.log2(spec.max))


@ALL
def test_codes_that_are_not_numbers(spec: FloatSpec) -> None:
    count = sum(not math.isfinite(value) for value in spec.values)
    signs = 2 if spec.signed else 1
    ieee = 1 << spec.mantissa_bits
    assert (
        count == {Specials.NONE: 0, Specials.NAN: signs, Specials.IEEE: signs * ieee}[spec.specials]
    )
    if spec.nan_code is not None:
        assert math.isnan(spec.value(spec.nan_code))


@ALL
def test_the_sign_is_the_top_bit(spec: FloatSpec) -> None:
    if spec.signed:
        negative = spec.value(1 << spec.magnitude_bits | spec.max_code)
        assert negative == -spec.max
        assert math.copysign(1, spec.value(1 << spec.magnitude_bits)) == -1


@ALL
@pytest.mark.parametrize("change", [str.lower, str.upper, lambda name: f" {name} "])
def test_names_parse_in_any_case(spec: FloatSpec, change: object) -> None:
    assert callable(change)
    assert parse_format(change(spec.name)) is spec


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("e2m1", "f4E2M1FN"),
        ("E2M1", "f4E2M1FN"),
        ("fp4_e2m1", "f4E2M1FN"),
        ("float4_e2m1fn", "f4E2M1FN"),
        ("float6_e3m2fn", "f6E3M2FN"),
        ("float8_e4m3fn", "f8E4M3FN"),
        ("e5m2", "f8E5M2"),
        ("e3m4", "f8E3M4"),
        ("e3m4fn", "f8E3M4FN"),
        ("e1m4", "f6E1M4FN"),
        ("e4m1", "f6E4M1FN"),
        ("e5m0", "f6E5M0FN"),
        ("e2m5", "f8E2M5FN"),
        ("float8_e1m6fn", "f8E1M6FN"),
        ("e4m3fnu", "f8E4M3FNU"),
        ("e8m0", "f8E8M0FNU"),
        ("float8_e8m0fnu", "f8E8M0FNU"),
        ("ue4m3", "f8E4M3FNU"),
    ],
)
def test_other_spellings(text: str, name: str) -> None:
    assert parse_format(text).name == name


@pytest.mark.parametrize("text", ["", "f4E2M2FN", "int4", "fp4", "e4m3b11", "float8_e4m3fnuz"])
def test_unknown_formats_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"There is no format .*Formats: f4E2M1FN, ") as caught:
        parse_format(text)
    assert isinstance(caught.value, FpcompilerError)
    assert isinstance(caught.value, ValueError)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(FormatError, match="Did you mean f4E2M1FN"):
        parse_format("f4E2M1FM")


@pytest.mark.parametrize("code", [-1, 16])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(FormatError, match=rf"f4E2M1FN has codes 0\.\.15, not {code}"):
        FORMATS["f4E2M1FN"].value(code)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["f4E2M1FN"] = FORMATS["f8E5M2"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["f4E2M1FN"].bias = 2  # type: ignore[misc]


def test_text_is_the_name() -> None:
    assert f"{FORMATS['f4E2M1FN']}" == "f4E2M1FN"
