"""Do the tensors of a layer have the types, shapes and values that its format asks for?

Each check knows the mistakes that lead to what it refuses, and names the likely one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fpcompiler.interop.checkpoints.files import Kind
from fpcompiler.interop.checkpoints.layouts import Layout
from fpcompiler.operand import BLOCK_SIZES

_NAN_E8M0 = 0xFF
_LARGEST_E4M3 = 0x7E
_SIGN = 0x80


def kind_problems(layout: Layout, kinds: dict[str, Kind]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with types and shapes: the tensor's name within the layer, and why.

    Args:
        layout: The format.
        kinds: The tensors of the layer that :meth:`Layout.tensors` names; all must be there.
    """
    codes, scale = kinds[layout.codes], kinds["weight_scale"]
    yield from _codes_kind(layout, codes)
    if scale.dtype != layout.scale_dtype:
        hint = " (scales of MX formats are powers of two)" if layout.scale_dtype == "U8" else ""
        yield "weight_scale", f"it is {scale}; {layout.name} has {layout.scale_dtype} here{hint}"
    if len(codes.shape) == 2:
        yield from _scale_shape(layout, codes, scale)
    for name in (layout.outer, layout.input_outer):
        if name in kinds:
            yield from _number_kind(name, kinds[name])


def _codes_kind(layout: Layout, codes: Kind) -> Iterator[tuple[str, str]]:
    if codes.dtype != layout.codes_dtype:
        yield layout.codes, f"it is {codes}; {layout.name} has {layout.codes_dtype} codes here"
    if len(codes.shape) != 2 or not codes.count:
        yield layout.codes, f"it is {codes}, but the codes of a weight are [N, bytes of K]"
        return
    k = layout.width(codes.shape[1])
    if codes.shape != layout.codes_shape(codes.shape[0], k) or k % layout.block.block:
        yield (
            layout.codes,
            f"it is {codes}, that is K = {k}, which is no multiple of the block of "
            f"{layout.block.block}",
        )


def _scale_shape(layout: Layout, codes: Kind, scale: Kind) -> Iterator[tuple[str, str]]:
    n, k = codes.shape[0], layout.width(codes.shape[1])
    block = layout.block.block
    expected = (n, k // block)
    if scale.shape == expected:
        return
    reason = f"it is {scale}, but {n} rows of K = {k} have {list(expected)} scales"
    padded = (-(-n // 128) * 128, -(-expected[1] // 4) * 4)
    sizes = [size for size in (8, *BLOCK_SIZES, 256) if scale.shape == (n, k // size)]
    if sizes:
        reason += f"; it has those of blocks of {sizes[0]}"
    elif scale.count == padded[0] * padded[1] and padded != expected:
        reason += "; it looks padded and swizzled for a kernel (tiles of 128 x 4)"
    elif scale.shape == expected[::-1]:
        reason += "; it looks transposed"
    elif scale.count == expected[0] * expected[1]:
        reason += "; it looks reordered for a kernel, or flattened"
    yield "weight_scale", reason


def _number_kind(name: str, kind: Kind) -> Iterator[tuple[str, str]]:
    if kind.dtype != "F32":
        yield name, f"it is {kind}, but the scale of a tensor is F32"
    elif kind.count != 1:
        yield name, f"it is {kind}, but a tensor has one scale"


def value_problems(
    layout: Layout, codes: Tensor, scale: Tensor, numbers: dict[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with values: the tensor's name within the layer, and why.

    Args:
        layout: The format.
        codes: ``[N, bytes]``, as bytes.
        scale: Codes of the scales ``[N, blocks]``, as bytes.
        numbers: The scales of tensors that there are, by name.
    """
    for name, number in numbers.items():
        value = float(number)
        if not (value > 0 and value < float("inf")):
            yield name, f"it is {value:g}, but a scale is a positive number"
    powers = layout.scale_dtype == "U8"
    bad = scale == _NAN_E8M0 if powers else (scale & ~_SIGN & 0xFF) > _LARGEST_E4M3
    if bool(bad.any()):
        yield "weight_scale", f"{_count(bad)} NaN"
        return
    if not powers and bool((scale >= _SIGN).any()):
        yield "weight_scale", f"{_count(scale >= _SIGN)} negative: its dtype may be read wrongly"
        return
    zero = (scale == 0) & (not powers)
    if bool(zero.any()) and bool((zero & _has_values(layout, codes, scale.shape[1])).any()):
        yield (
            "weight_scale",
            f"{_count(zero)} zero, though their blocks have codes that are not: their values are "
            "lost",
        )
    if layout.codes_dtype == "F8_E4M3":
        nan = (codes & ~_SIGN & 0xFF) > _LARGEST_E4M3
        if bool(nan.any()):
            yield layout.codes, f"{_count(nan)} NaN"


def _has_values(layout: Layout, codes: Tensor, blocks: int) -> Tensor:
    """Return whether each block has a code that is not zero, ``[N, blocks]``; 4-bit codes."""
    assert layout.operand.format.storage_bits == 4
    return ((codes & 0x77) != 0).view(codes.shape[0], blocks, -1).any(-1)


def _count(bad: Tensor) -> str:
    number = int(bad.sum())
    row, column = (int(i) for i in bad.nonzero()[0])
    return f"{number} of its {bad.numel()} values (the first at [{row}, {column}]) are"


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor of one-byte values as bytes."""
    return tensor.view(torch.uint8)
