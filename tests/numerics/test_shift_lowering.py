"""Both lowerings of pre-shifted biases: every container counted, and permuted GEMMs bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec, Specials, parse_format
from fpcompiler.numerics import decode, dequantize, encode
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.preshift import fold, preshift
from fpcompiler.numerics.shift_lowering import (
    Buckets,
    bucket_permutation,
    container,
    container_shifts,
)
from fpcompiler.operand import Operand
from tests.models import normal

TARGETS = [parse_format(name) for name in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")]


def all_finite(exponent_bits: int, mantissa_bits: int) -> FloatSpec:
    return FloatSpec(f"fE{exponent_bits}M{mantissa_bits}", exponent_bits, mantissa_bits, bias=0)


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        (all_finite(3, 0), [0, 0, 3, 12, 26]),
        (all_finite(2, 1), [1, 3, 6, 15, 29]),
        (all_finite(1, 2), [0, 4, 7, 16, 30]),
        (all_finite(2, 3), [0, 1, 0, 12, 0]),
        (all_finite(3, 2), [0, 0, 1, 10, 24]),
        (all_finite(4, 1), [0, 0, 0, 3, 17]),
        (all_finite(5, 0), [0, 0, 0, 0, 2]),
        (all_finite(3, 4), [0, 0, 0, 0, 0]),
        (all_finite(1, 4), [0, 0, 0, 0, 0]),
        (all_finite(2, 5), [0, 0, 0, 0, 0]),
        (all_finite(1, 6), [0, 0, 0, 0, 0]),
        (all_finite(6, 1), [0, 0, 0, 0, 0]),
        (all_finite(4, 3), [0, 0, 0, 0, 0]),
        (all_finite(5, 2), [0, 0, 0, 0, 0]),
    ],
    ids=lambda value: value.name if isinstance(value, FloatSpec) else "",
)
def test_how_many_windows_hold_a_format(source: FloatSpec, counts: list[int]) -> None:
    assert [len(container_shifts(source, target)) for target in TARGETS] == counts


@pytest.mark.parametrize(
    ("weight", "limit", "magnitudes", "counts"),
    [
        ("e3m0", 7, 15, [0, 0, 0, 5, 19]),
        ("e3m0", 3, 11, [0, 0, 0, 9, 23]),
        ("e3m0", 1, 9, [0, 0, 2, 11, 25]),
        ("e2m1", 7, 22, [0, 0, 0, 8, 22]),
        ("e2m1", 3, 14, [0, 0, 3, 12, 26]),
        ("e2m1", 1, 10, [0, 2, 5, 14, 28]),
        ("e1m2", 7, 36, [0, 0, 0, 9, 23]),
        ("e1m2", 3, 20, [0, 1, 4, 13, 27]),
        ("e1m2", 1, 12, [0, 3, 6, 15, 29]),
    ],
)
def test_how_many_windows_hold_folded_weights(
    weight: str, limit: int, magnitudes: int, counts: list[int]
) -> None:
    spec = parse_format(weight)
    exponents = torch.arange(limit + 1, dtype=torch.int32)
    values = decode(torch.arange(16, dtype=torch.uint8), spec)
    folded = fold(values[:, None].expand(16, limit + 1), exponents)
    assert len(folded.abs().unique()) == magnitudes
    assert [len(container_shifts(spec, target, limit)) for target in TARGETS] == counts


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("limit", [0, 1, 3, 7])
@pytest.mark.parametrize(
    "source",
    ["e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e1m4", "e4m1", "e5m0", "e3m4fn", "e1m6", "e4m3"],
)
def test_windows_against_a_search_of_all_shifts(source: str, limit: int, target: FloatSpec) -> None:
    spec = parse_format(source)
    values = [v for v in spec.values if math.isfinite(v)]
    shifts = [
        shift
        for shift in range(-80, 81)
        if all(v * 2.0 ** (shift - k) in target.values for v in values for k in range(limit + 1))
    ]
    assert list(container_shifts(spec, target, limit)) == shifts


@pytest.mark.parametrize("source", ["e2m1", "e1m2", "e3m0"])
@pytest.mark.parametrize("limit", [0, 1, 3, 7])
def test_every_folded_code_is_exact(source: str, limit: int) -> None:
    spec = parse_format(source)
    held = container(spec, limit, TARGETS)
    exponents = torch.arange(limit + 1, dtype=torch.int32)
    codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, limit + 1)
    folded = held.fold(codes, exponents)
    wanted = decode(codes, spec, torch.float64) * 2.0 ** -exponents.double()
    assert torch.equal(decode(folded, held.format, torch.float64) * held.factor, wanted)
    assert held.format is next(t for t in TARGETS if container_shifts(spec, t, limit))
    assert abs(held.shift) == min(map(abs, container_shifts(spec, held.format, limit)))


def test_the_container_is_the_first_that_fits() -> None:
    e2m1 = parse_format("e2m1")
    names = [(container(e2m1, k, TARGETS).format.short) for k in (0, 1, 3, 7)]
    assert names == ["E2M1", "E2M3", "E3M2", "E4M3"]
    assert container(e2m1, 0, TARGETS[::-1]).format.short == "E5M2"
    assert container(e2m1, 3, TARGETS).factor == 1.0
    with pytest.raises(NumericsError, match=r"none of f4E2M1FN, f6E2M3FN holds f4E2M1FN times"):
        container(e2m1, 3, TARGETS[:2])


def test_a_container_refuses_exponents_that_it_does_not_hold() -> None:
    held = container(parse_format("e2m1"), 1, TARGETS)
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(NumericsError, match="exponents 0 to 1, but some are out of that range"):
        held.fold(codes, torch.tensor([0, 1, 2]))
    with pytest.raises(NumericsError, match=r"codes \[2, 3\] need as many exponents"):
        held.fold(codes, torch.tensor([0, 1]))


def test_special_values_do_not_count() -> None:
    # E5M2 holds itself, although NaN is not equal to NaN.
    e5m2 = parse_format("e5m2")
    assert e5m2.specials is Specials.IEEE
    assert container_shifts(e5m2, e5m2) == (0,)


exponent_lists = st.lists(st.integers(0, 7), max_size=300)


@settings(deadline=None, max_examples=60)
@given(exponent_lists, st.sampled_from([1, 16, 32]), st.sampled_from([None, 1, 2, 3]))
def test_buckets_hold_every_channel_once(
    exponents: list[int], group: int, most: int | None
) -> None:
    k, count = torch.tensor(exponents, dtype=torch.int32), len(exponents)
    buckets = bucket_permutation(k, group=group, max_buckets=most)
    order = buckets.order
    assert sorted(order[order < count].tolist()) == list(range(count))
    assert len(order) == len(buckets.group_exponents) * group
    padded = torch.cat([buckets.exponents, torch.tensor([-1], dtype=torch.int32)])[order]
    repeated = buckets.group_exponents.repeat_interleave(group)
    assert bool(((padded == repeated) | (padded == -1)).all())
    assert bool((buckets.exponents <= k).all())
    used = set(buckets.exponents.tolist())
    assert used == set(buckets.group_exponents.tolist())
    assert len(order) - count <= (group - 1) * len(used)
    if most is None:
        assert torch.equal(buckets.exponents, k)
    else:
        assert len(used) <= most


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(1, 4))
def test_merged_buckets_have_the_least_steps(exponents: list[int], most: int) -> None:
    k = torch.tensor(exponents, dtype=torch.int32)
    found = bucket_permutation(k, max_buckets=most).exponents

    def cost(kept: list[int]) -> float:
        return sum(4.0 ** -max(e for e in kept if e <= exponent) for exponent in exponents)

    rest = sorted(set(exponents))[1:]
    choices = [[c for i, c in enumerate(rest) if bits >> i & 1] for bits in range(1 << len(rest))]
    least = min(cost([min(exponents), *choice]) for choice in choices if len(choice) <= most - 1)
    assert sum(4.0**-e for e in found.tolist()) == pytest.approx(least, rel=1e-12)


def test_the_most_padding_of_256_channels() -> None:
    def length(*counts: int) -> int:
        k = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(counts)])
        return len(bucket_permutation(k).order)

    assert length(256) == 256
    assert length(100, 60, 50, 46) == 320
    # Three buckets of a single channel: four buckets of zeros less than 32 each.
    assert length(253, 1, 1, 1) == 352


def permuted(buckets: Buckets, codes: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return permuted codes and the scales of their blocks: one real, and 2**-k in E8M0."""
    blocks = buckets.scale_codes.expand(len(codes), -1)
    return buckets.permute(codes), torch.full((1, 1), scale), blocks


@pytest.mark.parametrize("source", ["e2m1", "e1m2", "e3m0", "e2m3"])
def test_e8m0_blocks_equal_the_simulation_bit_for_bit(source: str) -> None:
    spec, k = parse_format(source), 256
    exponents = torch.arange(k) * 5 % 7
    x = normal(20, k) * exact_power(-exponents)
    shift = preshift(x.abs().amax(0), spec)
    buckets = bucket_permutation(shift.exponents)
    operand = Operand.parse(f"{spec}@tensor:f32/block32:f8E8M0FNU")
    plain = encode(shift.unscaled(x), spec)
    codes, *scales = permuted(buckets, plain, shift.scale)
    value = dequantize(codes, tuple(scales), operand)
    assert len(buckets.group_exponents) >= 4
    assert torch.equal(value, buckets.permute(shift.quantize(x)))
    # Quantizing the permuted values with those scales gives the same codes.
    total = shift.scale * exact_power(-buckets.group_exponents).repeat_interleave(32)
    assert torch.equal(encode(buckets.permute(x) / total, spec), codes)


@pytest.mark.parametrize("most", [None, 2])
def test_a_permuted_gemm_equals_the_unpermuted_one_bit_for_bit(most: int | None) -> None:
    spec, k = parse_format("e2m1"), 300
    x, w = normal(16, k) * exact_power(-(torch.arange(k) % 4)), normal(24, k)
    first = preshift(x.abs().amax(0), spec)
    buckets = bucket_permutation(first.exponents, max_buckets=most)
    weight = encode(w * 2, spec)
    codes = encode((x * exact_power(buckets.exponents)) / first.scale, spec)
    x_value = decode(codes, spec, torch.float64) * exact_power(-buckets.exponents)
    w_value = decode(weight, spec, torch.float64)
    # Every product is a whole number times 2**-5, below 2**14: the sums are exact in fp64.
    wanted = x_value @ w_value.T
    blocks = exact_power(-buckets.group_exponents).double()
    left = decode(buckets.permute(codes), spec, torch.float64).unflatten(-1, (-1, 32))
    right = decode(buckets.permute(weight), spec, torch.float64).unflatten(-1, (-1, 32))
    partial = torch.einsum("tgk,ngk->tng", left, right)
    assert torch.equal((partial * blocks).sum(-1), wanted)
    # Option A: the same sums with folded weights in a wider container.
    held = container(spec, int(buckets.exponents.max()), TARGETS)
    folded = decode(held.fold(weight, buckets.exponents), held.format, torch.float64)
    unshifted = decode(codes, spec, torch.float64)
    assert torch.equal(unshifted @ folded.T * held.factor, wanted)


def test_formats_of_the_library_are_those_of_the_tables() -> None:
    names = "e3m0 e2m1 e1m2 e2m3 e3m2 e1m4 e4m1 e5m0 e2m5 e1m6"
    for name in names.split():
        spec = parse_format(name)
        bias_0 = all_finite(spec.exponent_bits, spec.mantissa_bits)
        for target in FORMATS.values():
            moved = [shift - spec.bias for shift in container_shifts(spec, target)]
            assert moved == list(container_shifts(bias_0, target))


@pytest.mark.parametrize(
    ("exponents", "group", "most", "message"),
    [
        (torch.tensor([0.5]), 32, None, r"exponents must be integers \[K\] from 0 to 31"),
        (torch.tensor([[1]]), 32, None, "exponents must be integers"),
        (torch.tensor([-1]), 32, None, "exponents must be integers"),
        (torch.tensor([32]), 32, None, "exponents must be integers"),
        (torch.tensor([1]), 0, None, "a group of 0 channels"),
        (torch.tensor([1]), 32, 0, "0 buckets are not possible"),
    ],
)
def test_refusals(exponents: Tensor, group: int, most: int | None, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        bucket_permutation(exponents, group=group, max_buckets=most)
