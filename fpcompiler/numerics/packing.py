"""Codes to bytes and back: two 4-bit codes in a byte, four 6-bit codes in three bytes.

The layout is the one that CUTLASS reads: the code with the even index in the low nibble, and 6-bit
codes as one dense little-endian stream. A row starts on a byte of its own; a row that does not fill
its last unit is filled up with zeros.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.rounding import value_table
from fpcompiler.numerics.scratch import Scratch, chunks


def packed_bytes(k: int, bits: int) -> int:
    """Return the bytes of a packed row of ``k`` codes of 4, 6 or 8 bits."""
    unit, size = _unit(bits)
    return -(-k // unit) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 ``[..., K]``, one code a byte.
        bits: Bits of a code: 4, 6 or 8.

    Returns:
        uint8 ``[..., packed_bytes(K, bits)]``.

    Raises:
        NumericsError: If ``bits`` is another number, or the codes are not bytes.
    """
    _require_bytes(codes)
    packed = codes.new_empty(*codes.shape[:-1], packed_bytes(codes.shape[-1], bits))
    pack_into(packed, codes, bits, Scratch(codes.device))
    return packed


def pack_into(out: Tensor, codes: Tensor, bits: int, scratch: Scratch) -> None:
    """Write packed codes to ``out``, as :func:`pack` has them.

    Args:
        out: uint8 ``[..., packed_bytes(K, bits)]``, contiguous.
        codes: uint8 ``[..., K]``.
        bits: Bits of a code: 4, 6 or 8.
        scratch: Memory of the device of ``codes``.
    """
    if bits == 8:
        out.copy_(codes)
        return
    rest = -codes.shape[-1] % _unit(bits)[0]
    flat = _aligned(pad(codes, (0, rest)) if rest else codes)
    if bits == 4:
        pairs = flat.view(torch.int16)
        packed = scratch.take("packed", pairs.shape, torch.int16)
        torch.bitwise_right_shift(pairs, 4, out=packed)
        out.view(-1).copy_(packed.bitwise_or_(pairs))
        return
    words = flat.view(torch.int32)
    packed = scratch.take("packed", words.shape, torch.int32).copy_(words).bitwise_and_(63)
    shifted = scratch.take("shifted", words.shape, torch.int32)
    for i in (1, 2, 3):
        torch.bitwise_right_shift(words, 2 * i, out=shifted)
        packed.bitwise_or_(shifted.bitwise_and_(63 << 6 * i))
    out.view(-1, 3).copy_(packed.view(torch.uint8).view(-1, 4)[:, :3])


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8 ``[..., packed_bytes(k, bits)]``.
        bits: Bits of a code: 4, 6 or 8.
        k: Codes in a row.

    Returns:
        uint8 ``[..., k]``, one code a byte.

    Raises:
        NumericsError: If ``bits`` is another number, or ``k`` codes do not take as many bytes.
    """
    _require_packed(packed, bits, k)
    if bits == 8:
        return packed.clone()
    unit, size = _unit(bits)
    full = (*packed.shape[:-1], packed.shape[-1] // size * unit)
    if bits == 4:
        pairs = packed.reshape(-1).to(torch.int16)
        codes = pairs.bitwise_or(pairs << 4).bitwise_and_(0x0F0F)
    else:
        words = _words(packed)
        codes = words & 63
        for i in (1, 2, 3):
            codes.bitwise_or_((words << 2 * i).bitwise_and_(63 << 8 * i))
    return codes.view(torch.uint8).view(full)[..., :k].contiguous()


def decode_packed(packed: Tensor, spec: FloatSpec, k: int, *, out: Tensor | None = None) -> Tensor:
    """Return the values of packed codes: the same as ``decode(unpack(...))``, two at a time.

    Args:
        packed: uint8 ``[..., packed_bytes(k, spec.storage_bits)]``.
        spec: The format.
        k: Codes in a row.
        out: Optional memory for the result: fp32 ``[..., k]``, contiguous.

    Returns:
        fp32 ``[..., k]``.

    Raises:
        NumericsError: If ``k`` codes do not take as many bytes, or ``out`` does not fit.
    """
    bits, shape = spec.storage_bits, (*packed.shape[:-1], k)
    _require_packed(packed, bits, k)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=packed.device)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise NumericsError(
            f"the memory for {list(shape)} decoded values must be contiguous fp32 of that shape, "
            f"not {out.dtype} {list(out.shape)}."
        )
    codes = packed_bytes(k, bits) * 8 // bits
    if bits == 8 and k % 2:
        packed, codes = pad(packed, (0, 1)), k + 1
    if codes == k:
        _decode_pairs(out, packed, spec)
        return out
    padded = torch.empty((*packed.shape[:-1], codes), dtype=torch.float32, device=packed.device)
    _decode_pairs(padded, packed, spec)
    return out.copy_(padded[..., :k])


def _decode_pairs(out: Tensor, packed: Tensor, spec: FloatSpec) -> None:
    """Write the values of packed codes, an even number in each row, to contiguous ``out``."""
    bits, device = spec.storage_bits, packed.device
    table, scratch = _pair_table(spec, device), Scratch(device)
    flat, pairs = _aligned(packed), out.view(-1).view(torch.float64)
    size, count = {4: (1, 1), 6: (3, 2), 8: (2, 1)}[bits]
    for part in chunks(flat.numel() // size, 2 * count, device):
        index = _pair_indices(flat[part.start * size : part.stop * size], bits, scratch)
        torch.index_select(table, 0, index, out=pairs[part.start * count : part.stop * count])


def _pair_indices(packed: Tensor, bits: int, scratch: Scratch) -> Tensor:
    """Return each two neighbouring codes as one number, int32, the first in its low bits."""
    if bits == 6:
        words = _words(packed).to(torch.int64)
        second = (words << 20).bitwise_and_(0xFFF << 32)
        return words.bitwise_and_(0xFFF).bitwise_or_(second).view(torch.int32)
    if bits == 4:
        return scratch.take("index", packed.shape, torch.int32).copy_(packed)
    words = packed.view(torch.int16)
    return scratch.take("index", words.shape, torch.int32).copy_(words).bitwise_and_(0xFFFF)


def _words(packed: Tensor) -> Tensor:
    """Return the 24 bits of each three bytes as one int32."""
    return pad(packed.reshape(-1, 3), (0, 1)).view(torch.int32).view(-1)


def _aligned(codes: Tensor) -> Tensor:
    """Return the codes as one axis that can be viewed as words of up to four bytes."""
    flat = codes.reshape(-1)
    return flat.clone() if flat.storage_offset() % 4 else flat


@lru_cache(maxsize=32)
def _pair_table(spec: FloatSpec, device: torch.device) -> Tensor:
    """Return each two values as the bytes of one fp64, in the order of :func:`_pair_indices`."""
    count = 1 << spec.storage_bits
    values = value_table(spec)[:count]
    pairs = torch.stack([values.repeat(count), values.repeat_interleave(count)], dim=-1)
    return pairs.view(torch.float64).view(-1).to(device)


def _unit(bits: int) -> tuple[int, int]:
    """Return how many codes are packed together, and into how many bytes."""
    units = {4: (2, 1), 6: (4, 3), 8: (1, 1)}
    if bits not in units:
        raise NumericsError(f"codes of {bits} bits cannot be packed; only 4, 6 or 8.")
    return units[bits]


def _require_packed(packed: Tensor, bits: int, k: int) -> None:
    _require_bytes(packed)
    if packed.shape[-1] != packed_bytes(k, bits):
        raise NumericsError(
            f"{k} codes of {bits} bits take {packed_bytes(k, bits)} bytes a row, "
            f"not {packed.shape[-1]}."
        )


def _require_bytes(tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8 or not tensor.ndim:
        raise NumericsError(
            f"codes are uint8 with at least one axis, not {tensor.dtype} {list(tensor.shape)}."
        )
