"""Quantization by the native library: the results of :mod:`.scaling`, bit for bit, faster."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fpcompiler.native import Library, library
from fpcompiler.native.structs import Format, OperandStruct
from fpcompiler.operand import Granularity, Operand, ScaleRounding

INPUTS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OUTER: Final = {Granularity.TENSOR: 1, Granularity.ROW: 2, Granularity.TOKEN: 2}
BLOCK_SCALES: Final = {"f32": 0, "f8E8M0FNU": 1, "f8E4M3FN": 2}
_ROUNDINGS: Final = {
    ScaleRounding.FLOOR: 0, ScaleRounding.CEIL: 1, ScaleRounding.RNE: 2, ScaleRounding.MSE: 3,
}  # fmt: skip
_NOT_FINITE: Final = 1
NO_MEMORY: Final = 2

_VALUES_PER_THREAD: Final = 1 << 16
"""Fewer are done before another thread has started."""


def quantizer(rows: Tensor, operand: Operand) -> Library | None:
    """Return the library if it can quantize ``rows``, which must then be on the CPU."""
    if rows.device.type != "cpu" or rows.dtype not in INPUTS or not operand.format.zero:
        return None
    return library()


def quantize_rows(
    native: Library,
    rows: Tensor,
    operand: Operand,
    bits: int,
    packed: Tensor,
    scales: tuple[Tensor, ...],
) -> bool:
    """Quantize rows into memory that is given; see :func:`fpcompiler.numerics.quantize_packed`.

    Args:
        native: What :func:`quantizer` returned.
        rows: ``[R, K]``, not empty.
        operand: Element format and scale levels.
        bits: Bits that a code takes in ``packed``.
        packed: uint8, contiguous, as many bytes as ``R`` packed rows.
        scales: Contiguous memory for each level.

    Returns:
        Whether all values are finite; if not, what was written is not defined.

    Raises:
        MemoryError: If there is none left for a row.
    """
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    outer = scales[0].data_ptr() if operand.outer else None
    block = scales[-1].data_ptr() if operand.block else None
    threads = max(1, min(torch.get_num_threads(), rows.numel() // _VALUES_PER_THREAD))
    status = native.functions.fpc_quantize(
        ctypes.byref(operand_struct(operand, bits)), rows.data_ptr(), INPUTS[rows.dtype],
        rows.shape[0], rows.shape[1], rows.stride(0), packed.data_ptr(), outer, block, threads,
        native.instructions,
    )  # fmt: skip
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for a row of {rows.shape[1]} values")
    return bool(status != _NOT_FINITE)


@lru_cache(maxsize=256)
def operand_struct(operand: Operand, bits: int) -> OperandStruct:
    """Return an operand as the native library takes it, with the bits of a stored code."""
    spec, block = operand.format, operand.block
    return OperandStruct(
        element=Format(
            spec.mantissa_bits, spec.magnitude_bits, spec.min_exponent, spec.max_exponent, spec.max
        ),
        outer=_OUTER[operand.outer.granularity] if operand.outer else 0,
        block=block.block if block else 0,
        block_scale=BLOCK_SCALES[block.format] if block else 0,
        rounding=_ROUNDINGS[block.rounding] if block and block.rounding else 0,
        code_bits=bits,
    )
