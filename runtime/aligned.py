"""Memory for what kernels read: aligned, and in huge pages where it is large.

A product with one row reads all weights once, and memory in pages of 4 KB is read more slowly: 1.1
to 1.4 times (w4a6 of 4096 x 4096 and others, one thread of a Zen 4).
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

import torch
from torch import Tensor

ALIGNMENT: Final = 64
"""Of all memory that kernels read: a cache line."""

HUGE_PAGE: Final = 2 << 20
"""Bytes of a huge page on x86-64 and, mostly, on AArch64."""

_HUGE_FROM: Final = 2 * HUGE_PAGE
_ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)


def aligned_memory(size: int) -> Tensor:
    """Return ``size`` bytes that are not set, uint8, aligned to :data:`ALIGNMENT`.

    From 4 MB on they are aligned to :data:`HUGE_PAGE`, and the system is asked for such pages; it
    may have none.
    """
    if size >= _HUGE_FROM and _ADVICE is not None:
        return _in_huge_pages(size, _ADVICE)
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return _from(memory, size, ALIGNMENT)


def _in_huge_pages(size: int, advice: int) -> Tensor:
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    # The rest, less than a page, stays in small ones. A kernel without huge pages refuses.
    with contextlib.suppress(OSError):
        pages.madvise(advice, start, size - size % HUGE_PAGE)
    return _from(memory, size, HUGE_PAGE)


def _from(memory: Tensor, size: int, alignment: int) -> Tensor:
    start = -memory.data_ptr() % alignment
    return memory[start : start + size]
