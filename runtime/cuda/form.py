"""What passes between quantizers and layers on a GPU: operands as GEMM kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics.kernel_layout import K_ALIGNMENT, aligned, kernel_scales, scale_bytes
from fpcompiler.numerics.packing import pack, packed_bytes
from fpcompiler.numerics.rounding import decode
from fpcompiler.numerics.scaling import dequantize
from fpcompiler.numerics.shift_lowering import Container, container
from fpcompiler.operand import Granularity, Operand
from fpcompiler.runtime.cuda.stored import BF16, I8, integer_shift, why_not

_BOUNDARY: Final = 32
"""Bytes; the kernels refuse operands that begin elsewhere."""


@dataclass(frozen=True)
class InputKind:
    """What activations must agree in so that several layers can share them.

    Attributes:
        operand: How they are quantized; None for plain bf16.
        k: Length of a row.
        element: What the kernels read: an element format, or ``i8`` or ``bf16`` of
            :mod:`fpcompiler.runtime.cuda.stored`.
        alignment: Rows are filled up to a multiple of it.
    """

    operand: Operand | None
    k: int
    element: str
    alignment: int = K_ALIGNMENT

    @property
    def padded_k(self) -> int:
        """Length of a row as kernels see it."""
        return aligned(self.k, self.alignment)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        if self.element == BF16:
            return 2 * self.padded_k
        return packed_bytes(self.padded_k, _code_bits(self.element))

    @property
    def has_tensor_scale(self) -> bool:
        """Whether one real number scales all values."""
        outer = self.operand.outer if self.operand else None
        return outer is not None and outer.granularity is Granularity.TENSOR

    @property
    def scale_pitch(self) -> int:
        """How many scales of blocks a row has beside its codes, with those of the padding."""
        block = self.operand.block if self.operand else None
        return self.padded_k // block.block if block and self.element != BF16 else 0

    def block_scale_bytes(self, rows: int) -> int:
        """Return the bytes of the scales of blocks; 0 without."""
        return scale_bytes(rows, self.scale_pitch) if self.scale_pitch else 0

    def outer_count(self, rows: int) -> int:
        """Return how many words of 32 bits hold the real scales, and the sums of integers."""
        if self.operand is None or self.operand.outer is None:
            return 0
        return 1 if self.has_tensor_scale else 2 * rows if self.element == I8 else rows


class CudaInput(NamedTuple):
    """Activations as GEMM kernels read them.

    Attributes:
        kind: What they are.
        shape: Their shape without the last axis.
        rows: Product of that shape.
        codes: uint8 ``[rows, kind.row_bytes]``.
        block_scale: Scales of blocks in tiles, or None.
        token_scale: fp32 ``[rows]``, or None. With integers, ``[2 * rows]``: behind the scales
            stand the bits of the sums of each row's integers, int32.
        scalar: The scale of the whole tensor, fp32 ``[1]``, or None.
        products: What layers that are multiplied as one have computed of it, by their number.
    """

    kind: InputKind
    shape: tuple[int, ...]
    rows: int
    codes: Tensor
    block_scale: Tensor | None
    token_scale: Tensor | None
    scalar: Tensor | None
    products: dict[int, Tensor]


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
    return CudaInput(kind, shape, rows, codes, block, token, scalar, {})


def held_in(spec: FloatSpec, element: str) -> Container | None:
    """Return how the format that kernels read holds another one; None if they are the same.

    Raises:
        NumericsError: If it does not hold every number.
    """
    target = FORMATS[element]
    return None if spec is target else container(spec, 0, (target,))


def factor_of(spec: FloatSpec, element: str) -> float:
    """Return what numbers that kernels read must be multiplied by to be those of a format.

    It is a power of two, which belongs into the factor of all results.

    Args:
        spec: The format of the values.
        element: What kernels read, as in :class:`InputKind`.

    Raises:
        NumericsError: If it does not hold every number.
    """
    if element == BF16:
        return 1.0
    if element == I8:
        return 2.0 ** -integer_shift(spec)
    held = held_in(spec, element)
    return held.factor if held else 1.0


def check_held(operand: Operand, element: str) -> None:
    """Check that kernels can read activations in a form without rounding them.

    Raises:
        NumericsError: If not.
    """
    if element in FORMATS:
        held_in(operand.format, element)
        return
    reason = why_not(operand, element)
    if reason:
        raise NumericsError(f"kernels cannot read {operand} as {element}: {reason}.")


def code_table(spec: FloatSpec, element: str, device: torch.device) -> Tensor | None:
    """Return the kernels' code of each code of a format, uint8.

    Returns:
        None if they are the same, and for bf16, which has no codes.
    """
    if element == BF16:
        return None
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    if element == I8:
        integers = decode(codes, spec) * 2.0 ** integer_shift(spec)
        return integers.to(torch.int8).view(torch.uint8).to(device)
    held = held_in(spec, element)
    if held is None:
        return None
    return held.fold(codes, torch.zeros(len(codes), dtype=torch.int32)).to(device)


def input_of_codes(kind: InputKind, x: Sequence[Tensor], table: Tensor | None) -> CudaInput:
    """Return activations that were quantized by torch as kernels read them.

    Args:
        kind: What the kernels read.
        x: ``[codes [..., K], *scales]``, as ``fpc.quantize`` returns them.
        table: What :func:`code_table` returned.
    """
    operand = kind.operand
    assert operand is not None
    shape = tuple(x[0].shape[:-1])
    codes = x[0].reshape(-1, kind.k)
    rows = codes.shape[0]
    outer = x[1].reshape(-1) if operand.outer else None
    scales = x[-1].reshape(rows, x[-1].shape[-1]) if operand.block else None
    if kind.element == BF16:
        stored = _padded(kind, _products(operand, codes, scales)).view(torch.uint8)
    else:
        if table is not None:
            codes = table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
        stored = pack(_padded(kind, codes), _code_bits(kind.element))
    if kind.element == I8 and outer is not None:
        outer = torch.cat([outer, _sums(codes)])
    block = None
    if scales is not None and operand.block and kind.scale_pitch:
        block = kernel_scales(scales, operand.block.block, kind.k)
    if outer is not None:
        outer = at_boundary(outer)
    return with_scales(kind, shape, rows, at_boundary(stored), outer, block)


def input_of_values(kind: InputKind, x: Tensor) -> CudaInput:
    """Return activations that are not quantized as the kernels read them.

    Args:
        kind: What the kernels read, bf16.
        x: bf16 ``[..., K]``.
    """
    rows = x.reshape(-1, kind.k)
    stored = at_boundary(_padded(kind, rows).contiguous()).view(torch.uint8)
    return CudaInput(kind, tuple(x.shape[:-1]), rows.shape[0], stored, None, None, None, {})


def _code_bits(element: str) -> int:
    return 8 if element == I8 else FORMATS[element].storage_bits


def _padded(kind: InputKind, values: Tensor) -> Tensor:
    missing = kind.padded_k - kind.k
    return pad(values, (0, missing)) if missing else values


def _products(operand: Operand, codes: Tensor, scales: Tensor | None) -> Tensor:
    """Return the values with the scales of their blocks, bf16 ``[rows, K]``."""
    block = operand.block
    inner = Operand(operand.format, (block,) if block else ())
    return dequantize(codes, () if scales is None else (scales,), inner, torch.bfloat16)


def _sums(integers: Tensor) -> Tensor:
    """Return the bits of the sums of int8 numbers ``[rows, K]`` as fp32 ``[rows]``."""
    sums = integers.view(torch.int8).sum(-1, dtype=torch.int32)
    return sums.view(torch.float32)


def at_boundary(tensor: Tensor) -> Tensor:
    """Return a tensor that begins where kernels can read it: part of a larger one is copied."""
    if torch.compiler.is_compiling():
        return tensor  # Where it begins is not known yet; the operator looks.
    # Allocations begin at multiples of more.
    start = tensor.storage_offset() * tensor.itemsize
    return tensor.clone() if start % _BOUNDARY else tensor
