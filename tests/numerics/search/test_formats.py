"""The formats and biases of LLM-FP4, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import FormatError
from fpcompiler.formats import FORMATS, FloatSpec, parse_format
from fpcompiler.numerics import decode, encode, round_to
from fpcompiler.numerics.search import bias_of, finite_format, largest_of, paper_formats

PAPER = [spec for bits in (4, 6, 8) for spec in paper_formats(bits)]

BIAS_ZERO = {
    "E3M0": [0, 2, 4, 8, 16, 32, 64, 128],
    "E2M1": [0, 1, 2, 3, 4, 6, 8, 12],
    "E1M2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "E2M3": [n / 4 for n in range(16)] + [n / 2 for n in range(8, 16)] + list(range(8, 16)),
    "E3M2": [n / 2 for n in range(8)]
    + [4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56]
    + [64, 80, 96, 112, 128, 160, 192, 224],
    "E1M4": [n / 8 for n in range(32)],
}
BIAS_ZERO_MAX = {"E4M1": 49152, "E5M0": 2**31, "E3M4": 248, "E4M3": 61440}


def by_short(name: str) -> FloatSpec:
    return next(spec for spec in PAPER if spec.short == name)


def magnitudes(spec: FloatSpec) -> list[float]:
    return list(spec.values[: 1 << spec.magnitude_bits])


def test_the_formats_of_each_width() -> None:
    names = {bits: [spec.short for spec in paper_formats(bits)] for bits in (4, 6, 8)}
    assert names == {
        4: ["E3M0", "E2M1", "E1M2"],
        6: ["E5M0", "E4M1", "E3M2", "E2M3", "E1M4"],
        8: ["E5M2", "E4M3", "E3M4", "E2M5", "E1M6"],
    }
    assert len({spec.name for spec in PAPER} | set(FORMATS)) == len(FORMATS) + 2
    for bits in names:
        assert all(spec.storage_bits == bits for spec in paper_formats(bits))


def test_formats_that_have_a_row_are_that_row() -> None:
    assert finite_format(2, 1) is FORMATS["f4E2M1FN"]
    assert finite_format(3, 4) is FORMATS["f8E3M4FN"]
    new = [spec for spec in PAPER if spec.name not in FORMATS]
    assert [spec.name for spec in new] == ["f8E5M2Finite", "f8E4M3Finite"]
    # The standard's E4M3 has NaN and ends at 448.
    assert finite_format(4, 3) not in FORMATS.values()
    assert finite_format(4, 3).max == 480


@pytest.mark.parametrize("name", BIAS_ZERO)
def test_values_with_bias_zero(name: str) -> None:
    assert magnitudes(dataclasses.replace(by_short(name), bias=0)) == BIAS_ZERO[name]


@pytest.mark.parametrize("name", BIAS_ZERO_MAX)
def test_the_largest_number_with_bias_zero(name: str) -> None:
    spec = dataclasses.replace(by_short(name), bias=0)
    assert spec.max == BIAS_ZERO_MAX[name]
    assert len(set(magnitudes(spec))) == 1 << spec.magnitude_bits


def test_values_with_the_bias_of_hardware() -> None:
    assert magnitudes(parse_format("e2m1")) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    e2m3 = (
        [n / 8 for n in range(16)] + [n / 4 for n in range(8, 16)] + [4 + n / 2 for n in range(8)]
    )
    assert magnitudes(parse_format("e2m3")) == e2m3
    assert magnitudes(parse_format("e3m2")) == [value / 8 for value in BIAS_ZERO["E3M2"]]
    for name, smallest, largest, count in (("e4m3", -9, 448, 127), ("e5m2", -16, 57344, 124)):
        finite = [v for v in magnitudes(parse_format(name)) if math.isfinite(v)]
        assert (finite[1], finite[-1], len(finite)) == (2.0**smallest, largest, count)


@pytest.mark.parametrize("spec", PAPER, ids=str)
def test_every_code_is_a_number_and_comes_back(spec: FloatSpec) -> None:
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    values = decode(codes, spec)
    assert torch.equal(values, torch.tensor(spec.values))
    assert torch.equal(encode(values, spec), codes)


@pytest.mark.parametrize("spec", PAPER, ids=str)
def test_between_two_numbers_the_nearer_one_is_taken(spec: FloatSpec) -> None:
    values = torch.tensor(magnitudes(spec), dtype=torch.float64)
    low, high = values[:-1], values[1:]
    assert torch.equal(round_to(low + 0.49 * (high - low), spec), low)
    assert torch.equal(round_to(low + 0.51 * (high - low), spec), high)


@pytest.mark.parametrize(
    ("name", "bias", "values", "mse"),
    [
        ("e2m1", 2.048910, [0, -0.725, 1.45, 2.9], 8.281250e-3),
        ("e1m2", 0.271302, [0, -0.828571, 1.242857, 2.9], 7.448980e-3),
        ("e3m0", 5.463947, [0.090625, -0.725, 1.45, 2.9], 5.803223e-3),
    ],
)
def test_rounding_with_a_real_bias(name: str, bias: float, values: list[float], mse: float) -> None:
    spec, x = parse_format(name), torch.tensor([0.1, -0.7, 1.3, 2.9], dtype=torch.float64)
    found = bias_of(x.abs().max(), spec)
    assert float(found) == pytest.approx(bias, abs=5e-7)
    scale = largest_of(found, spec) / spec.max
    rounded = round_to(x / scale, spec) * scale
    torch.testing.assert_close(rounded, torch.tensor(values).double(), rtol=0, atol=5e-7)
    assert float((rounded - x).square().mean()) == pytest.approx(mse, rel=1e-6)


def test_ties_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7])
    assert round_to(ties, parse_format("e2m1")).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("spec", PAPER, ids=str)
def test_the_bias_is_that_of_equation_7(spec: FloatSpec) -> None:
    largest = torch.tensor([1e-6, 0.3, 1.0, 12.0, 4000.0], dtype=torch.float64)
    e, m = spec.exponent_bits, spec.mantissa_bits
    expected = 2**e - largest.log2() + math.log2(2 - 2.0**-m) - 1
    torch.testing.assert_close(bias_of(largest, spec), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        largest_of(bias_of(largest, spec), spec), largest, rtol=1e-12, atol=0
    )


def test_the_bias_of_zero_is_infinite() -> None:
    spec = parse_format("e2m1")
    bias: Tensor = bias_of(torch.zeros(1), spec)
    assert bias.item() == math.inf
    assert largest_of(bias, spec).item() == 0


@pytest.mark.parametrize(("exponent", "mantissa"), [(0, 3), (5, 3), (2, -1)])
def test_fields_that_are_not_possible(exponent: int, mantissa: int) -> None:
    with pytest.raises(FormatError, match="is not possible: a format has at least one exponent"):
        finite_format(exponent, mantissa)


def test_a_width_that_is_not_in_the_paper() -> None:
    with pytest.raises(FormatError, match="formats of 4, 6 and 8 bits, not of 5"):
        paper_formats(5)
