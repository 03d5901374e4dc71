"""A tensor as rows of blocks, read a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpcompiler.numerics.scratch import Scratch, chunks


@dataclass(frozen=True)
class Blocks:
    """Rows cut into blocks of values that share a scale; the last block of a row may be short.

    Attributes:
        rows: ``[R, K]``, not empty, of any floating-point dtype and strides.
        width: Values in a block.
        scratch: Working memory; what :meth:`load` returns may be in it.
    """

    rows: Tensor
    width: int
    scratch: Scratch

    @property
    def count(self) -> int:
        """How many blocks a row has."""
        return -(-self.rows.shape[1] // self.width)

    def parts(self) -> Iterator[slice]:
        """Yield the rows of one chunk after the other."""
        return chunks(self.rows.shape[0], self.count * self.width, self.rows.device)

    def load(self, part: slice) -> Tensor:
        """Return rows as contiguous fp32 ``[rows, blocks, width]``, filled up with zeros.

        The result is valid until the next call, and only to be read.
        """
        rows = self.rows[part]
        shape = (rows.shape[0], self.count, self.width)
        padding = self.count * self.width - rows.shape[1]
        if rows.dtype == torch.float32 and rows.is_contiguous() and not padding:
            return rows.view(shape)
        value = self.scratch.take("value", shape, torch.float32)
        padded = value.view(shape[0], -1)
        padded[:, : rows.shape[1]] = rows
        padded[:, rows.shape[1] :] = 0.0
        return value

    def largest(self) -> Tensor:
        """Return the bits of the largest magnitude of each block, int32 ``[R, blocks, 1]``.

        As integers they compare like the magnitudes, with infinity and NaN above all numbers, and
        subnormal numbers above zero even in a flush-to-zero mode.
        """
        shape = (self.rows.shape[0], self.count, 1)
        largest = torch.empty(shape, dtype=torch.int32, device=self.rows.device)
        for part in self.parts():
            value = self.load(part)
            bits = self.scratch.take("bits", value.shape, torch.int32)
            torch.bitwise_and(value.view(torch.int32), 0x7FFF_FFFF, out=bits)
            torch.amax(bits, -1, keepdim=True, out=largest[part])
        return largest

    def new_sums(self) -> Tensor:
        """Return memory for a sum over each block, fp64 ``[R, blocks, 1]``."""
        shape = (self.rows.shape[0], self.count, 1)
        return torch.empty(shape, dtype=torch.float64, device=self.rows.device)

    def add_up(self, terms: Tensor, out: Tensor) -> None:
        """Write the sum of the fp32 terms of each block to ``out``, added in fp64."""
        wide = self.scratch.take("wide", terms.shape, torch.float64).copy_(terms)
        torch.sum(wide, -1, keepdim=True, out=out)
