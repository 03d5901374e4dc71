"""Working memory that is used again for every chunk.

A large tensor is worked on in chunks that stay in cache. Fresh memory for each intermediate result
would cost more than the arithmetic, because the system hands it out page by page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 18
_CUDA_CHUNK = 1 << 22
_BYTES_PER_VALUE = 48
"""What quantization takes at most; the system does not give pages that are not touched."""


class Scratch:
    """Named buffers on one device; a name gives the same memory every time.

    All are cut from one allocation, whose size the first buffer decides, because an allocator that
    gives memory back to the system gives back many small pieces sooner than a large one.
    """

    def __init__(self, device: torch.device) -> None:
        self._free = torch.empty(0, dtype=torch.uint8, device=device)
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of a shape, with whatever the last user of the name left in it."""
        key = (name, tuple(shape), dtype)
        if key not in self._views:
            size = math.prod(shape) * dtype.itemsize
            if name not in self._buffers or self._buffers[name].numel() < size:
                self._buffers[name] = self._cut(size, math.prod(shape))
            self._views[key] = self._buffers[name][:size].view(dtype).view(shape)
        return self._views[key]

    def _cut(self, size: int, values: int) -> Tensor:
        aligned = -(-size // 64) * 64
        if self._free.numel() < aligned:
            self._free = self._free.new_empty(max(aligned, values * _BYTES_PER_VALUE))
        buffer, self._free = self._free[:size], self._free[aligned:]
        return buffer


def chunks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of at least one row that together cover ``rows`` rows of ``width`` values."""
    limit = _CPU_CHUNK if device.type == "cpu" else _CUDA_CHUNK
    step = max(1, limit // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
