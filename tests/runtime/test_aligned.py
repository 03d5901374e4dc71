"""Memory for kernels."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.runtime import aligned
from fpcompiler.runtime.aligned import ALIGNMENT, HUGE_PAGE, aligned_memory


@pytest.mark.parametrize("size", [0, 1, 1000, 2 * HUGE_PAGE - 1, 2 * HUGE_PAGE, 5 * HUGE_PAGE + 3])
def test_memory_is_aligned_and_can_be_written_to_its_end(size: int) -> None:
    memory = aligned_memory(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % (HUGE_PAGE if size >= 2 * HUGE_PAGE else ALIGNMENT) == 0 or not size
    assert int(memory.fill_(7).sum(dtype=torch.int64)) == 7 * size


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned, "_ADVICE", 12345)
    memory = aligned_memory(3 * HUGE_PAGE)
    assert int(memory.fill_(1).sum(dtype=torch.int64)) == 3 * HUGE_PAGE
