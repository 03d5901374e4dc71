"""Weights of four bits as the tensor cores of Hopper take them: from registers.

``wgmma`` and ``mma.sync`` read the left operand of a product of 16 rows from registers of 32 lanes;
lane ``4g + t`` has rows ``g`` and ``g + 8`` (PTX ISA, "Register Fragments for wgmma"). Codes are
stored so that each lane loads 16 bytes in one piece, for 64 values of K, and decodes them to what
it has to hold:

``codes[R][s][lane][word]``, rows ``16R ..``, K from ``64s``. Word ``2j + h`` holds eight codes of
row ``16R + g + 8h`` for the 32 values of K from ``64s + 32j``. Which ones differs:

* :attr:`Order.BYTES`, for products of bytes: nibble ``i`` is ``k = 4t + i``, nibble ``4 + i`` is
  ``k = 16 + 4t + i``, so that four nibbles become the four bytes of a register.
* :attr:`Order.HALVES`, for products of bf16: pair ``2q + x`` is ``k = 16q + 8x + 2t`` in the low
  half of the word and the next ``k`` in the high half. The bits of E2M1 lie where a shift puts them
  to where bf16 has its sign, its exponent and its first mantissa bit.
"""

from __future__ import annotations

import enum
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics.kernel_layout import aligned

__all__ = [
    "Order", "FRAGMENT_ROWS", "FRAGMENT_K", "fragment_codes", "codes_of_fragments",
    "power_scales", "e4m3_scales", "fragment_scales",
]  # fmt: skip

FRAGMENT_ROWS: Final = 16
"""Rows are filled up with zeros to a multiple of it."""

FRAGMENT_K: Final = 128
"""And so is K."""

_E4M3_EXPONENT: Final = 18
"""Of scales in E4M3, whose exponents begin at -9."""

_MOST: Final = 253
"""The byte of a power of two that is 1: the field of bf16's exponent, times 2**126."""


class Order(enum.Enum):
    """Where the codes of a word lie."""

    BYTES = 8
    HALVES = 16


def fragment_codes(codes: Tensor, order: Order) -> Tensor:
    """Return codes of four bits in fragments.

    Args:
        codes: uint8 ``[N, K]``, one code per byte.
        order: Which product reads them. ``HALVES`` takes E2M1 only.

    Returns:
        uint8 ``[aligned(N), aligned(K) / 2]``: the bytes in order, as a matrix for its size.

    Raises:
        NumericsError: If it is no matrix of such codes.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise NumericsError(f"codes must be uint8 [N, K], not {codes.dtype} {list(codes.shape)}.")
    n, k = (aligned(s, a) for s, a in zip(codes.shape, (FRAGMENT_ROWS, FRAGMENT_K), strict=True))
    full = pad(codes, (0, k - codes.shape[1], 0, n - codes.shape[0]))
    places = _places(order).to(codes.device)
    words = torch.zeros(n * k // 8, dtype=torch.int32, device=codes.device)
    for place, part in zip(places, _by_place(full, order), strict=True):
        words |= place[part.reshape(-1).to(torch.int32)]
    return words.view(torch.uint8).view(n, k // 2)


def codes_of_fragments(fragments: Tensor, order: Order, n: int, k: int) -> Tensor:
    """Undo :func:`fragment_codes`; returns uint8 ``[n, k]``."""
    wide_n, wide_k = fragments.shape[0], fragments.shape[1] * 2
    words = fragments.reshape(-1).view(torch.int32)
    shape = (wide_n // 16, wide_k // 64, 8, 4, 2, 2)
    found = []
    for place in _places(order).to(fragments.device):
        bits = words & int(place[15])
        code = torch.zeros_like(words)
        for bit in range(4):
            code |= (bits & int(place[1 << bit])).ne(0).to(torch.int32) << bit
        found.append(code.to(torch.uint8).view(shape))
    stacked = torch.stack(found)
    if order is Order.BYTES:  # [half, i, R, s, g, t, j, h]
        both = stacked.view(2, 4, *shape).permute(2, 7, 4, 3, 6, 0, 5, 1)
    else:  # [q, x, b, R, s, g, t, j, h]
        both = stacked.view(2, 2, 2, *shape).permute(3, 8, 5, 4, 7, 0, 1, 6, 2)
    return both.reshape(wide_n, wide_k)[:n, :k].contiguous()


def power_scales(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales in E8M0 as kernels read them, and what is left for the scale of each row.

    Kernels multiply bf16 by 2**126 times a scale, so that none may exceed 1. The largest one of
    a row becomes 1; the smallest they hold is 2**-252.

    Args:
        codes: uint8 ``[N, blocks]``, exponents with a bias of 127.

    Returns:
        uint8 ``[N, blocks]`` and fp32 ``[N]``.
    """
    most = codes.amax(dim=1, keepdim=True).to(torch.int32)
    stored = (codes.to(torch.int32) - most + _MOST).clamp(min=1).to(torch.uint8)
    return stored, torch.exp2((most[:, 0] - 127).to(torch.float64)).to(torch.float32)


def e4m3_scales(codes: Tensor) -> tuple[Tensor, float]:
    """Return scales in E4M3 as kernels read them, and the factor that is left for all of them.

    Exponents get a field of five bits, so that subnormal numbers are none: ``e + 18`` and three
    bits of mantissa.

    Args:
        codes: uint8 ``[N, blocks]``, without signs. Code 0 becomes 0, which kernels take for
            2**-18: the codes of such a block must be zero.

    Returns:
        uint8 ``[N, blocks]`` and 2**7.
    """
    table = torch.zeros(256, dtype=torch.uint8)
    spec = FORMATS["f8E4M3FN"]
    for code, value in enumerate(spec.values[: spec.code_count // 2]):
        if value > 0:
            mantissa, exponent = torch.frexp(torch.tensor(float(value)))
            fraction = int((float(mantissa) * 2 - 1) * 8)
            table[code] = (int(exponent) - 1 + _E4M3_EXPONENT) * 8 + fraction
    return table.to(codes.device)[codes.to(torch.int32)], 2.0**7


def fragment_scales(scales: Tensor, block: int) -> Tensor:
    """Return scales of blocks as kernels read them beside fragments.

    Args:
        scales: uint8 ``[N, blocks]``.
        block: Values in a block, 16 or 32.

    Returns:
        uint8 ``[aligned(N) / 16, aligned(K) / 128, 16, 128 / block]``; what fills up is 1.
    """
    each = FRAGMENT_K // block
    rows, blocks = aligned(scales.shape[0], FRAGMENT_ROWS), aligned(scales.shape[1], each)
    fill = (0, blocks - scales.shape[1], 0, rows - scales.shape[0])
    full = pad(scales, fill, value=1)
    tiles = full.view(rows // FRAGMENT_ROWS, FRAGMENT_ROWS, blocks // each, each)
    return tiles.permute(0, 2, 1, 3).contiguous()


def _by_place(codes: Tensor, order: Order) -> list[Tensor]:
    """Return for each place in a word the codes that go there, words in order."""
    n, k = codes.shape
    if order is Order.BYTES:
        view = codes.view(n // 16, 2, 8, k // 64, 2, 2, 4, 4)  # R h g s j half t i
        moved = view.permute(5, 7, 0, 3, 2, 6, 4, 1)  # half i R s g t j h
        return list(moved.flatten(0, 1))
    view = codes.view(n // 16, 2, 8, k // 64, 2, 2, 2, 4, 2)  # R h g s j q x t b
    moved = view.permute(5, 6, 8, 0, 3, 2, 7, 4, 1)  # q x b R s g t j h
    return list(moved.flatten(0, 2))


def _places(order: Order) -> Tensor:
    """Return the bits of each code at each of the eight places, int32 ``[8, 16]``."""
    codes = torch.arange(16, dtype=torch.int64)
    if order is Order.BYTES:
        rows = [codes << 4 * place for place in range(8)]
    else:
        sign, rest = codes >> 3, codes & 7
        pairs = [
            sign << 15 | rest << 6,
            sign << 12 | rest << 3,
            sign << 9 | rest,
            sign << 14 | (codes & 4) << 11 | (codes & 3) << 10,
        ]
        rows = [pair << 16 * half for pair in pairs for half in range(2)]
    words = torch.stack(rows)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
