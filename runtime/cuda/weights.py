"""Weights as kernels read them, whichever kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.numerics.kernel_layout import aligned, kernel_codes, kernel_scales
from fpcompiler.operand import Granularity, Operand
from fpcompiler.runtime.cuda.form import held_in


@dataclass(frozen=True, eq=False)
class KernelWeights:
    """The weights of a layer on a GPU.

    Attributes:
        codes: uint8 ``[padded N, bytes of a row]``.
        scales: Scales of blocks, or None.
        row: A scale for each row, fp32 ``[N]``, or None.
        alpha: A factor of all results.
        outputs: N without what fills up.
    """

    codes: Tensor
    scales: Tensor | None
    row: Tensor | None
    alpha: float
    outputs: int

    @property
    def padded(self) -> int:
        """N as kernels see it."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        parts = (self.codes, self.scales, self.row)
        return sum(part.nbytes for part in parts if part is not None)

    def padded_rows(self, values: Tensor) -> Tensor:
        """Return a number for each row of the padded weight, fp32."""
        flat = values.detach().reshape(-1).to(torch.float32)
        return pad(flat, (0, self.padded - self.outputs)).contiguous()


def outer_scale(w: Sequence[Tensor], operand: Operand) -> tuple[Tensor | None, float]:
    """Return the scale of each row, or None, and that of the whole tensor, or 1."""
    if operand.outer is None:
        return None, 1.0
    if operand.outer.granularity is Granularity.TENSOR:
        return None, float(w[1].view(-1)[0])
    return w[1].reshape(-1), 1.0


def tiled_weights(
    w: Sequence[Tensor], operand: Operand, k: int, element: str, row_alignment: int
) -> KernelWeights:
    """Return weights as CUTLASS's kernels read them.

    Args:
        w: ``[packed [N, bytes], *scales]``, on the device of the kernels.
        operand: What ``w`` is.
        k: Length of a row.
        element: The format in which the kernels read the codes.
        row_alignment: Rows are filled up to a multiple of it.
    """
    held = held_in(operand.format, element)
    codes = kernel_codes(w[0], operand.format, k, held=held, row_alignment=row_alignment)
    scales = kernel_scales(w[-1], operand.block.block, k) if operand.block else None
    row, alpha = outer_scale(w, operand)
    factor = held.factor if held else 1.0
    assert codes.shape[0] == aligned(w[0].shape[0], row_alignment)
    return KernelWeights(codes, scales, row, alpha * factor, w[0].shape[0])
