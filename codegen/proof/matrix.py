"""Random matrices of codes and block scales, the same on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.codegen.container import NATIVE
from fpcompiler.codegen.proof.host_reference import Stored
from fpcompiler.errors import TargetError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode, pack, unpack
from fpcompiler.numerics.kernel_layout import (
    K_ALIGNMENT,
    aligned,
    kernel_codes,
    kernel_scales,
)
from fpcompiler.numerics.shift_lowering import Container, container
from fpcompiler.numerics.tensor_core import Factor
from fpcompiler.operand import Operand

_HELD_IN: Final = tuple(FORMATS[name] for name in NATIVE["mxf8f6f4"])
"""What the instructions take, in the order in which kernels choose."""

_BLOCKS: Final = (None, (32, "f8E8M0FNU"), (16, "f8E4M3FN"))
"""What blocks Blackwell's instructions have."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One operand in the canonical form, and how a kernel holds it.

    Attributes:
        operand: Element format and scales; real scales are left to the epilogue.
        held: The format that the instructions take.
        codes: uint8 ``[rows, K]``, one code a byte.
        scales: Block scales, uint8 ``[rows, ceil(K / block)]``; None for none.
    """

    operand: Operand
    held: Container
    codes: Tensor
    scales: Tensor | None

    @classmethod
    def random(cls, operand: Operand, rows: int, k: int, seed: str) -> Matrix:
        """Return codes of finite numbers, and scales from 2**-6 to 2**6 or, of E4M3, all positive.

        Args:
            operand: Element format and scales.
            rows: R.
            k: K.
            seed: Decides every byte, through SHAKE-256: no library's random numbers do.
        """
        spec, block = operand.format, operand.block
        finite = torch.tensor(spec.values).isfinite()
        codes = _bytes(rows, k, 0, spec.code_count, f"{seed} codes")
        codes.masked_fill_(~finite[codes.int()], 0)
        scales = None
        if block:
            low, high = (121, 134) if block.format == "f8E8M0FNU" else (1, 127)
            scales = _bytes(rows, -(-k // block.block), low, high, f"{seed} scales")
        return cls(operand, container(spec, 0, _HELD_IN), codes, scales)

    @property
    def packed(self) -> Tensor:
        """The codes in the canonical layout, uint8 ``[rows, bytes]``."""
        return pack(self.codes, self.operand.format.storage_bits)

    def values(self) -> Tensor:
        """Return what the canonical form stands for, without real scales: fp64 ``[rows, K]``."""
        values = decode(self.codes, self.operand.format, torch.float64)
        block = self.operand.block
        if self.scales is None or block is None or block.spec is None:
            return values
        scales = decode(self.scales, block.spec, torch.float64)
        return values * scales.repeat_interleave(block.block, 1)[:, : values.shape[1]]

    def stored(self, row_alignment: int = 1) -> Stored:
        """Return the bytes that a kernel reads."""
        spec, k = self.operand.format, self.codes.shape[1]
        codes = kernel_codes(self.packed, spec, k, held=self.held, row_alignment=row_alignment)
        block = self.operand.block
        if self.scales is None or block is None:
            return Stored(codes, self.held.format)
        fill = (0, 0, 0, codes.shape[0] - self.scales.shape[0])
        tiles = kernel_scales(pad(self.scales, fill), block.block, k)
        return Stored(codes, self.held.format, tiles, block.format)

    def factor(self) -> Factor:
        """Return the matrix as a tensor core sees it, with K padded."""
        k = aligned(self.codes.shape[1], K_ALIGNMENT)
        held, block = self.held.format, self.operand.block
        codes = unpack(self.stored().codes, held.storage_bits, k)
        if self.scales is None or block is None:
            return Factor.of_codes(codes, held)
        scales = pad(self.scales, (0, k // block.block - self.scales.shape[1]))
        return Factor.of_codes(codes, held, scales, block.spec)


def require_blackwell(weight: Operand, activation: Operand) -> None:
    """Check that Blackwell's instructions have the block scales of both operands.

    Raises:
        TargetError: If they differ, or are of another kind.
    """
    blocks = {
        (level.block, level.format) if level else None for level in (weight.block, activation.block)
    }
    if len(blocks) > 1 or not blocks <= set(_BLOCKS):
        raise TargetError(
            "Blackwell multiplies operands of equal blocks, of 32 with E8M0 or of 16 with E4M3, "
            f"not w={weight},a={activation}."
        )


def _bytes(rows: int, columns: int, low: int, high: int, seed: str) -> Tensor:
    """Return numbers from ``low`` to ``high - 1``, uint8 ``[rows, columns]``."""
    stream = hashlib.shake_256(seed.encode()).digest(rows * columns)
    numbers = torch.frombuffer(bytearray(stream), dtype=torch.uint8).int()
    return (numbers % (high - low) + low).to(torch.uint8).view(rows, columns)
