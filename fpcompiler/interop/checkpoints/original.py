"""Are stored weights near the ones that were quantized? If not, which mistake explains it?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import CheckpointError
from fpcompiler.interop.checkpoints.files import Tensors
from fpcompiler.interop.checkpoints.stored import StoredLayer
from fpcompiler.numerics import cosine, sqnr_db
from fpcompiler.numerics.kernel_layout import swizzle_scales, unswizzle_scales

LEAST_DB: Final = 6.0
"""Rounding to E2M1 leaves 15 to 21 dB, GPTQ some less; anything else is not this weight."""

_SURE: Final = 0.97
"""Cosine from which on a mistake is named as the cause."""


def require_near(layer: StoredLayer, originals: Tensors, folder: Path) -> float:
    """Check one layer against the original model, and return its SQNR in dB.

    Args:
        layer: The quantized layer.
        originals: The tensors of the original model.
        folder: Where they are from, for errors.

    Raises:
        CheckpointError: If the original has no such weight, or it is another one; the message says
            which mistake in the file would explain it.
    """
    name = f"{layer.name}.weight"
    if name not in originals:
        raise CheckpointError(f"{folder}: the original has no tensor {name!r}.")
    original = originals.read(name).to(torch.float32)
    if original.shape != (layer.n, layer.k):
        raise CheckpointError(
            f"{folder}: tensor {name!r} is {list(original.shape)}, but the codes are those of "
            f"[{layer.n}, {layer.k}]."
        )
    found = sqnr_db(original, layer.dequantized())
    if found >= LEAST_DB:
        return found
    cause = next(_causes(layer, original), "it was not made from this original")
    raise CheckpointError(
        f"tensor '{layer.name}.{layer.layout.codes}': its values are not those of {name!r} in "
        f"{folder} ({found:.1f} dB): {cause}."
    )


def _causes(layer: StoredLayer, original: Tensor) -> Iterator[str]:
    """Yield the mistakes that make the codes fit, the likeliest first."""
    values = layer.dequantized()
    alike = cosine(original, values)
    if alike >= _SURE:
        factor = float(values.norm() / original.norm())
        yield f"they are {factor:.2g} times as large: {_scale_name(layer)} is wrong"
    if alike <= -_SURE:
        yield "all signs are the other way round"
    if layer.operand.format.storage_bits == 4:
        swapped = replace(layer, codes=(layer.codes << 4) | (layer.codes >> 4))
        if cosine(original, swapped.dequantized()) >= _SURE:
            yield "its nibbles are swapped (the first code is the low one)"
        if _fits_scales(original, swapped):
            yield "its nibbles are swapped, and its scales are in the order of a kernel"
    if _fits_scales(original, layer):
        yield "its scales are in the order of a kernel (tiles of 128 x 4)"
    rows = _order_of_rows(original, values)
    if rows:
        yield rows


def _scale_name(layer: StoredLayer) -> str:
    if layer.outer is None:
        return f"'{layer.name}.weight_scale'"
    return f"'{layer.name}.{layer.layout.outer}' (or it is stored as a reciprocal)"


def _fits_scales(original: Tensor, layer: StoredLayer) -> bool:
    n, blocks = layer.scale.shape
    if n % 128 or blocks % 4:
        return False
    flat = layer.scale.flatten()
    orders = (unswizzle_scales(flat, n, blocks), swizzle_scales(layer.scale).view(n, blocks))
    return any(
        cosine(original, replace(layer, scale=order).dequantized()) >= _SURE for order in orders
    )


def _order_of_rows(original: Tensor, values: Tensor) -> str:
    """Return what is wrong if rows are those of the original in another order."""
    for stride in (2, original.shape[0] // 2):
        if stride > 1 and original.shape[0] % stride == 0:
            order = torch.arange(len(original)).view(stride, -1).T.flatten()
            if cosine(original[order], values) >= _SURE:
                return "its rows are interleaved for a kernel"
    return ""
