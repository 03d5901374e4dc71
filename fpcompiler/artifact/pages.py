"""Memory of a mapped file: pages that were read and are not needed now can be given back."""

from __future__ import annotations

import mmap
import sys
from typing import Any


class Pages:
    """The pages of a file that is mapped into memory, privately.

    Pages count as memory of the process once they were read. Those that are given back are read
    from the file again when something needs them; most systems still have them in their cache.
    What a program has written to such pages would be lost, so nothing may write to them.
    """

    def __init__(self, buffer: mmap.mmap | None = None) -> None:
        """Stand for a mapping, or for none: then nothing is ever given back."""
        self._buffer = buffer if sys.platform == "linux" else None

    def release(self, start: int = 0, size: int | None = None) -> None:
        """Give back the pages within some bytes of the file; by default all."""
        if self._buffer is None:
            return
        end = len(self._buffer) if size is None else start + size
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if size is not None:
            end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            self._buffer.madvise(mmap.MADV_DONTNEED, first, end - first)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of what was read from a file has memory of its own."""
        return Pages, ()
