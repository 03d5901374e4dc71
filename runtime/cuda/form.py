"""What passes between quantizers and layers on a GPU: operands as GEMM kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics.kernel_layout import K_ALIGNMENT, aligned, kernel_scales, scale_bytes
from fpcompiler.numerics.packing import pack, packed_bytes
from fpcompiler.numerics.shift_lowering import Container, container
from fpcompiler.operand import Granularity, Operand

_BOUNDARY: Final = 32
"""Bytes; the kernels refuse operands that begin elsewhere."""


@dataclass(frozen=True)
class InputKind:
    """What activations must agree in so that several layers can share them.

    Attributes:
        operand: How they are quantized.
        k: Length of a row.
        element: The format in which the kernels read them.
    """

    operand: Operand
    k: int
    element: str

    @property
    def padded_k(self) -> int:
        """Length of a row as kernels see it."""
        return aligned(self.k, K_ALIGNMENT)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return packed_bytes(self.padded_k, FORMATS[self.element].storage_bits)

    @property
    def has_tensor_scale(self) -> bool:
        """Whether one real number scales all values."""
        outer = self.operand.outer
        return outer is not None and outer.granularity is Granularity.TENSOR

    def block_scale_bytes(self, rows: int) -> int:
        """Return the bytes of the scales of blocks; 0 without."""
        block = self.operand.block
        return scale_bytes(rows, self.padded_k // block.block) if block else 0


class CudaInput(NamedTuple):
    """Activations as GEMM kernels read them.

    Attributes:
        kind: What they are.
        shape: Their shape without the last axis.
        rows: Product of that shape.
        codes: uint8 ``[rows, kind.row_bytes]``.
        block_scale: Scales of blocks in tiles, or None.
        token_scale: fp32 ``[rows]``, or None.
        scalar: The scale of the whole tensor, fp32 ``[1]``, or None.
    """

    kind: InputKind
    shape: tuple[int, ...]
    rows: int
    codes: Tensor
    block_scale: Tensor | None
    token_scale: Tensor | None
    scalar: Tensor | None


def with_scales(
    kind: InputKind,
    shape: tuple[int, ...],
    rows: int,
    codes: Tensor,
    outer: Tensor | None,
    block: Tensor | None,
) -> CudaInput:
    """Return activations with their scales where kernels look for them."""
    shared = kind.has_tensor_scale
    token, scalar = (None, outer) if shared else (outer, None)
    return CudaInput(kind, shape, rows, codes, block, token, scalar)


def held_in(spec: FloatSpec, element: str) -> Container | None:
    """Return how the format that kernels read holds another one; None if they are the same.

    Raises:
        NumericsError: If it does not hold every number.
    """
    target = FORMATS[element]
    return None if spec is target else container(spec, 0, (target,))


def code_table(spec: FloatSpec, element: str, device: torch.device) -> Tensor | None:
    """Return the kernels' code of each code of a format, uint8; None if they are the same."""
    held = held_in(spec, element)
    if held is None:
        return None
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    return held.fold(codes, torch.zeros(len(codes), dtype=torch.int32)).to(device)


def input_of_codes(kind: InputKind, x: Sequence[Tensor], table: Tensor | None) -> CudaInput:
    """Return activations that were quantized by torch as kernels read them.

    Args:
        kind: What the kernels read.
        x: ``[codes [..., K], *scales]``, as ``fpc.quantize`` returns them.
        table: What :func:`code_table` returned.
    """
    operand, shape = kind.operand, x[0].shape[:-1]
    codes = x[0].reshape(-1, kind.k)
    rows = codes.shape[0]
    if table is not None:
        codes = table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    packed = pack(pad(codes, (0, kind.padded_k - kind.k)), FORMATS[kind.element].storage_bits)
    outer = at_boundary(x[1].reshape(-1)) if operand.outer else None
    block = None
    if operand.block:
        block = kernel_scales(x[-1].reshape(rows, x[-1].shape[-1]), operand.block.block, kind.k)
    return with_scales(kind, tuple(shape), rows, at_boundary(packed), outer, block)


def at_boundary(tensor: Tensor) -> Tensor:
    """Return a tensor that begins where kernels can read it: part of a larger one is copied."""
    # Allocations begin at multiples of more; an address would break graphs of torch.compile.
    start = tensor.storage_offset() * tensor.itemsize
    return tensor.clone() if start % _BOUNDARY else tensor
