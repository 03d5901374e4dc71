"""Fragments against the definition, written as loops, and kernels' decoding in Python."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode
from fpcompiler.numerics.fragment_layout import (
    Order,
    codes_of_fragments,
    e4m3_scales,
    fragment_codes,
    fragment_scales,
    power_scales,
)

E2M1 = FORMATS["f4E2M1FN"]


def random_codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(
        0, 16, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8
    )


def words_of(fragments: torch.Tensor) -> torch.Tensor:
    n, half = fragments.shape
    words = fragments.reshape(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return words.view(n // 16, half * 2 // 64, 32, 4)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("shape", [(16, 128), (32, 256), (40, 200), (1, 1)])
def test_fragments_are_undone(order: Order, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    stored = fragment_codes(codes, order)
    assert stored.shape == (-(-shape[0] // 16) * 16, -(-shape[1] // 128) * 64)
    assert torch.equal(codes_of_fragments(stored, order, *shape), codes)
    assert not codes_of_fragments(stored, order, stored.shape[0], 2 * stored.shape[1])[
        shape[0] :
    ].any()


def test_bytes_lie_as_the_registers_of_eight_bits() -> None:
    codes = random_codes(32, 256)
    words = words_of(fragment_codes(codes, Order.BYTES))
    for r, s, g, t, j, h, i in torch.randint(0, 1 << 30, (400, 7)).tolist():
        r, s, g, t, j, h, i = r % 2, s % 4, g % 8, t % 4, j % 2, h % 2, i % 8
        k = 64 * s + 32 * j + 4 * t + i % 4 + 16 * (i // 4)
        word = int(words[r, s, 4 * g + t, 2 * j + h])
        assert word >> 4 * i & 15 == int(codes[16 * r + g + 8 * h, k])


def test_halves_become_bf16_by_shifts() -> None:
    codes = random_codes(16, 128)
    words = words_of(fragment_codes(codes, Order.HALVES))
    mask = 0x81C081C0
    for s, g, t, j, h in torch.cartesian_prod(
        torch.arange(2), torch.arange(8), torch.arange(4), torch.arange(2), torch.arange(2)
    ).tolist():
        word = int(words[0, s, 4 * g + t, 2 * j + h])
        pairs = [word & mask, word << 3 & mask, word << 6 & mask]
        pairs.append(word << 1 & 0x80008000 | word >> 5 & 0x01000100 | word >> 4 & 0x00C000C0)
        for p, pair in enumerate(pairs):
            for b in range(2):
                bits = pair >> 16 * b & 0xFFFF
                value = torch.tensor([bits << 16], dtype=torch.int64).to(torch.int32)
                k = 64 * s + 32 * j + 16 * (p // 2) + 8 * (p % 2) + 2 * t + b
                expected = decode(codes[g + 8 * h, k : k + 1], E2M1).double() * 2.0**-126
                assert float(value.view(torch.float32).double()) == float(expected)


def test_scales_of_powers_of_two() -> None:
    codes = torch.randint(1, 254, (20, 9), generator=torch.Generator().manual_seed(0))
    stored, rows = power_scales(codes.to(torch.uint8))
    assert torch.equal(stored.amax(1), torch.full((20,), 253, dtype=torch.uint8))
    # The kernel puts the byte into the exponent field of bf16.
    multiplier = torch.exp2(stored.double() - 127) * 2.0**-126
    value = multiplier * rows.double().view(-1, 1)
    kept = stored > 1
    assert torch.equal(value[kept], torch.exp2(codes.double() - 127)[kept])


def test_every_scale_in_e4m3() -> None:
    spec = FORMATS["f8E4M3FN"]
    codes = torch.arange(1, 127, dtype=torch.uint8).view(1, -1)
    stored, factor = e4m3_scales(codes)
    bits = stored.to(torch.int64) * 16 + 0x7200
    multiplier = (bits << 16).to(torch.int32).view(torch.float32).double()
    assert torch.equal(multiplier * 2.0**-126 * factor, decode(codes, spec).double())


@pytest.mark.parametrize("block", [16, 32])
def test_scales_lie_beside_fragments(block: int) -> None:
    scales = torch.randint(0, 255, (40, 384 // block), dtype=torch.uint8)
    stored = fragment_scales(scales, block)
    each = 128 // block
    assert stored.shape == (3, 3, 16, each)
    for row in (0, 17, 39):
        for unit in range(3):
            expected = scales[row, unit * each : (unit + 1) * each]
            assert torch.equal(stored[row // 16, unit, row % 16], expected)
    assert bool((stored[2, :, 8:] == 1).all())


def test_what_is_no_matrix_of_codes_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"codes must be uint8 \[N, K\]"):
        fragment_codes(torch.zeros(3, dtype=torch.uint8), Order.BYTES)
    with pytest.raises(NumericsError, match="int32"):
        fragment_codes(torch.zeros(3, 3, dtype=torch.int32), Order.BYTES)
