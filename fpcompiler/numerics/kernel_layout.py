"""From the canonical layout of an artifact to what CUTLASS's kernels for Blackwell read, and back.

The canonical layout (see :mod:`.packing`) has rows of packed codes, each as long as its codes, and
scales row by row. A kernel reads

* rows of codes packed alike, with K padded to a multiple of :data:`K_ALIGNMENT` by codes of zero,
  because the tensor memory accelerator moves 128 codes of 4 and 6 bits at a time
  (``CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B``, ``..16U6_ALIGN16B``; CUDA driver API). Kernels that
  multiply FP4 by FP4 would take multiples of 32; one rule serves all. A format that no instruction
  takes is held in a wider one (:class:`~fpcompiler.numerics.shift_lowering.Container`);
* block scales in tiles of 128 rows by 4 blocks, tiles along K first. Within a tile of 512 bytes,
  row ``r`` and block ``b`` are at byte ``r % 32 * 16 + r // 32 * 4 + b`` (cuBLAS documentation,
  "1D block scaling factors layout"; ``Sm1xxBlockScaledConfig`` of CUTLASS). Rows and blocks that
  fill up a tile have scale code 0: a number in E8M0 and in E4M3, so that zero times it is zero.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.packing import pack, unpack
from fpcompiler.numerics.shift_lowering import Container

K_ALIGNMENT: Final = 128
"""Values that K is padded to a multiple of."""

_TILE_ROWS: Final = 128
_TILE_BLOCKS: Final = 4
_LANES: Final = 32
"""A tile is four groups of as many rows, side by side."""


def aligned(size: int, alignment: int) -> int:
    """Return the least multiple of ``alignment`` that is not below ``size``."""
    return -(-size // alignment) * alignment


def kernel_codes(
    packed: Tensor,
    spec: FloatSpec,
    k: int,
    *,
    held: Container | None = None,
    row_alignment: int = 1,
    k_alignment: int = K_ALIGNMENT,
) -> Tensor:
    """Return rows of packed codes as a kernel reads them.

    Args:
        packed: uint8 ``[R, packed_bytes(k, spec.storage_bits)]``, canonical.
        spec: The format of the codes.
        k: Codes in a row.
        held: The wider format that the kernel takes; the result then stands for
            ``2**held.shift`` times the values, which a scale has to make up for.
        row_alignment: Rows of zeros fill up a multiple of it.
        k_alignment: Codes of zero fill up each row to a multiple of it.

    Returns:
        uint8 ``[aligned(R), packed_bytes(aligned(k), bits)]``, contiguous, on the same device, with
        the bits of the format that the kernel takes.

    Raises:
        NumericsError: If the shape does not fit, or ``held`` holds another format.
    """
    _require_matrix(packed, "packed codes")
    codes = unpack(packed, spec.storage_bits, k)
    target = spec
    if held is not None:
        _require_source(held, spec)
        codes, target = _take(_codes_held(held), codes), held.format
    rows = codes.shape[0]
    fill = (0, aligned(k, k_alignment) - k, 0, aligned(rows, row_alignment) - rows)
    return pack(pad(codes, fill), target.storage_bits)


def canonical_codes(
    stored: Tensor, spec: FloatSpec, rows: int, k: int, *, held: Container | None = None
) -> Tensor:
    """Undo :func:`kernel_codes`.

    Args:
        stored: What :func:`kernel_codes` returned; K may have been padded to any multiple.
        spec: The format of the canonical codes.
        rows: Rows without those that fill up.
        k: Codes in a row, likewise.
        held: The format of ``stored``, if it is not ``spec``.

    Returns:
        uint8 ``[rows, packed_bytes(k, spec.storage_bits)]``.

    Raises:
        NumericsError: If ``stored`` is smaller than that, or a code stands for no value of
            ``spec``.
    """
    _require_matrix(stored, "stored codes")
    if held is not None:
        _require_source(held, spec)
    bits = (held.format if held else spec).storage_bits
    wide = stored.shape[1] * 8 // bits
    if stored.shape[0] < rows or wide < k:
        raise NumericsError(
            f"{list(stored.shape)} bytes hold {stored.shape[0]} rows of {wide} codes, not "
            f"{rows} of {k}."
        )
    codes = unpack(stored[:rows], bits, wide)[:, :k]
    if held is not None:
        codes = _source_codes(held, codes)
    return pack(codes.contiguous(), spec.storage_bits)


def kernel_scales(scales: Tensor, block: int, k: int, *, k_alignment: int = K_ALIGNMENT) -> Tensor:
    """Return block scales as a kernel reads them beside the rows of :func:`kernel_codes`.

    Args:
        scales: Codes of block scales, uint8 ``[R, ceil(k / block)]``, canonical.
        block: Values in a block: 16 or 32 on Blackwell.
        k: Values in a row.
        k_alignment: What K is padded to a multiple of.

    Returns:
        uint8 ``[scale_bytes(R, aligned(k) / block)]``.

    Raises:
        NumericsError: If the scales are not of as many blocks.
    """
    _require_matrix(scales, "scales")
    blocks = -(-k // block)
    if scales.shape[1] != blocks:
        raise NumericsError(
            f"{k} values in blocks of {block} have {blocks} scales a row, not {scales.shape[1]}."
        )
    return swizzle_scales(pad(scales, (0, -(-aligned(k, k_alignment) // block) - blocks)))


def swizzle_scales(scales: Tensor) -> Tensor:
    """Return scales in tiles of 128 rows by 4 blocks.

    Args:
        scales: uint8 ``[R, C]``, row by row.

    Returns:
        uint8 ``[scale_bytes(R, C)]``.

    Raises:
        NumericsError: If the scales are not uint8 of two axes.
    """
    _require_matrix(scales, "scales")
    rows, blocks = scales.shape
    fill = (0, -blocks % _TILE_BLOCKS, 0, -rows % _TILE_ROWS)
    tiles = pad(scales, fill).view(
        -(-rows // _TILE_ROWS), _TILE_ROWS // _LANES, _LANES, -(-blocks // _TILE_BLOCKS),
        _TILE_BLOCKS,
    )  # fmt: skip
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Undo :func:`swizzle_scales`.

    Args:
        swizzled: uint8 ``[scale_bytes(rows, blocks)]``.
        rows: R.
        blocks: C.

    Returns:
        uint8 ``[R, C]``.

    Raises:
        NumericsError: If there are not as many bytes.
    """
    size = scale_bytes(rows, blocks)
    if swizzled.dtype != torch.uint8 or swizzled.shape != (size,):
        raise NumericsError(
            f"{rows} rows of {blocks} scales take {size} bytes in tiles, "
            f"not {swizzled.dtype} {list(swizzled.shape)}."
        )
    tiles = swizzled.view(
        -(-rows // _TILE_ROWS), -(-blocks // _TILE_BLOCKS), _LANES, _TILE_ROWS // _LANES,
        _TILE_BLOCKS,
    )  # fmt: skip
    full = tiles.permute(0, 3, 2, 1, 4).reshape(
        aligned(rows, _TILE_ROWS), aligned(blocks, _TILE_BLOCKS)
    )
    return full[:rows, :blocks].contiguous()


def scale_bytes(rows: int, blocks: int) -> int:
    """Return the bytes of ``rows`` rows of ``blocks`` scales in tiles."""
    return aligned(rows, _TILE_ROWS) * aligned(blocks, _TILE_BLOCKS)


def _codes_held(held: Container) -> Tensor:
    """Return the code of the wider format for each code of the narrow one, uint8."""
    codes = torch.arange(held.source.code_count, dtype=torch.uint8)
    return held.fold(codes, torch.zeros(len(codes), dtype=torch.int32))


def _source_codes(held: Container, codes: Tensor) -> Tensor:
    """Return the narrow codes that wider ones stand for."""
    # 256 is no code; int16 has room for it.
    inverse = torch.full((256,), 256, dtype=torch.int16)
    inverse[_codes_held(held).long()] = torch.arange(held.source.code_count, dtype=torch.int16)
    found = _take(inverse, codes)
    if bool((found > 255).any()):
        raise NumericsError(f"some codes of {held.format} stand for no value of {held.source}.")
    return found.to(torch.uint8)


def _take(table: Tensor, codes: Tensor) -> Tensor:
    index = codes.reshape(-1).to(torch.int32)
    return table.to(codes.device).index_select(0, index).view(codes.shape)


def _require_source(held: Container, spec: FloatSpec) -> None:
    if held.source is not spec:
        raise NumericsError(f"codes of {spec} cannot be held as if they were of {held.source}.")
    if held.limit:
        raise NumericsError(
            f"a container for exponents up to {held.limit} holds folded codes; fold them first."
        )


def _require_matrix(tensor: Tensor, what: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.ndim != 2:
        raise NumericsError(
            f"{what} are uint8 [rows, bytes], not {tensor.dtype} {list(tensor.shape)}."
        )
