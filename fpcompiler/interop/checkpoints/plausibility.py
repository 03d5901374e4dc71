"""Can stored codes and scales be the values of a weight? What types and shapes do not show.

Readers and writers of checkpoints disagree about reciprocal scales, the order of nibbles and the
order of scales, and nothing in a file says which was meant: the result is a model that runs and
babbles. What can be seen without the original weights:

* a **reciprocal scale** makes weights a million times too large or too small;
* **scales in the order of a kernel** (tiles of 128 x 4) lose what rows have in common, where rows
  differ, and have more than 4 blocks;
* codes of **another number format** (two's complement, an offset) are not symmetric about zero;
* the largest code of a **block** is near the largest of the format, whoever chose the scale.

Swapped nibbles leave all of this as it is: within a pair, no weight is likelier to be first. They
show against the original weights (:mod:`.original`) and against checksums, which our own
checkpoints have.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from fpcompiler.interop.checkpoints.stored import StoredLayer
from fpcompiler.numerics import unpack
from fpcompiler.numerics.kernel_layout import unswizzle_scales

GAINS: Final = (2.0**-14, 256.0)
"""Between these lies the gain of a layer, the root mean square of its weights times ``sqrt(K)``.
In four pretrained models it is 0.17 to 9.5 (SmolLM2, MiniLM, DINOv2, Whisper)."""

INPUTS: Final = (2.0**-12, 2688.0)
"""Between these lies the largest input of the median layer. A reciprocal scale stands for
``2688**2`` over it, which is above them wherever the truth is below."""

_LEAST_BLOCKS: Final = 64
"""With fewer blocks in a weight, nothing is counted."""

_ASYMMETRY: Final = 0.25
_SHORT_BLOCKS: Final = 0.1
_TOP: Final = 5  # the code of 3, half of the largest number
_LEAST_COHERENCE: Final = 2.0
_COHERENCE_GAIN: Final = 1.5


def layer_problem(layer: StoredLayer) -> tuple[str, str] | None:
    """Return what cannot be in one layer: the tensor's name within it, and why; or None."""
    return (
        _code_problem(layer)
        or _gain_problem(layer)
        or (_order_problem(layer) if layer.outer is not None else None)
    )


def input_problem(layers: Sequence[StoredLayer]) -> tuple[StoredLayer, str] | None:
    """Return a layer whose static input scale cannot be, if most of them cannot; or None."""
    static = [layer for layer in layers if layer.input_outer is not None]
    largest = {layer.name: 2688 * _number(layer.input_outer) for layer in static}
    if not static or INPUTS[0] <= statistics.median(largest.values()) <= INPUTS[1]:
        return None
    first = static[0]
    return first, (
        f"it stands for inputs of up to {largest[first.name]:.3g} (of the median layer "
        f"{statistics.median(largest.values()):.3g}): {_inverted(first)}"
    )


def _number(scale: Tensor | None) -> float:
    assert scale is not None
    return float(scale)


def _inverted(layer: StoredLayer) -> str:
    stored = "one over the scale" if layer.layout.reciprocal else "the scale itself"
    other = "the scale itself" if layer.layout.reciprocal else "one over it"
    return f"the format stores {stored}, this looks like {other}"


def _code_problem(layer: StoredLayer) -> tuple[str, str] | None:
    if layer.operand.format.storage_bits != 4 or layer.scale.numel() < _LEAST_BLOCKS:
        return None
    codes = unpack(layer.codes, 4, layer.k)
    counts = torch.bincount(codes.flatten().int(), minlength=16)
    filled_codes = int(counts[1:8].sum() + counts[9:].sum())
    if not filled_codes:
        return layer.layout.codes, "all of its codes are zero: it was never filled"
    uneven = float((counts[1:8] - counts[9:]).abs().sum()) / filled_codes
    if uneven > _ASYMMETRY:
        return layer.layout.codes, (
            f"{uneven:.0%} of its codes have no counterpart of the other sign: these are not the "
            "codes of E2M1 (sign and magnitude)"
        )
    largest = (codes & 7).view(layer.n, -1, layer.layout.block.block).amax(-1)
    filled = largest > 0
    short = float(((largest < _TOP) & filled).sum()) / max(1, int(filled.sum()))
    if short > _SHORT_BLOCKS:
        return layer.layout.codes, (
            f"in {short:.0%} of its blocks no code reaches half of the largest number: codes and "
            f"blocks of {layer.layout.block.block} do not belong together"
        )
    return None


def _gain_problem(layer: StoredLayer) -> tuple[str, str] | None:
    gain = float(layer.dequantized().double().square().mean().sqrt()) * layer.k**0.5
    if GAINS[0] <= gain <= GAINS[1]:
        return None
    told = f"with it the weight has a gain of {gain:.3g}, and no layer has"
    if layer.outer is None:
        return "weight_scale", f"{told}: these look like reciprocals, or have another bias"
    return layer.layout.outer, f"{told}: {_inverted(layer)}"


def _order_problem(layer: StoredLayer) -> tuple[str, str] | None:
    n, blocks = layer.scale.shape
    if n % 128 or blocks % 4 or blocks == 4:
        return None  # It would have another shape; or hold whole rows, in another order.
    as_stored = _coherence(layer.scale)
    in_order = _coherence(unswizzle_scales(layer.scale.flatten(), n, blocks))
    if in_order < _LEAST_COHERENCE or in_order < _COHERENCE_GAIN * as_stored:
        return None
    return "weight_scale", (
        "its values belong together in the order of a kernel (tiles of 128 x 4), not in that of "
        "the rows: it was stored swizzled"
    )


def _coherence(scale: Tensor) -> float:
    """Return how much more rows differ than they would if values were dealt out at random."""
    logs = scale.view(torch.float8_e4m3fn).to(torch.float32).clamp(min=2.0**-9).log2()
    spread = float(logs.var())
    return float(logs.mean(1).var()) * logs.shape[1] / spread if spread else 0.0


def suspicions(layers: Sequence[StoredLayer]) -> Iterator[tuple[str, str, str]]:
    """Yield what cannot be: the layer, the tensor's name within it, and why."""
    for layer in layers:
        found = layer_problem(layer)
        if found:
            yield (layer.name, *found)
    inputs = input_problem(layers)
    if inputs:
        yield inputs[0].name, inputs[0].layout.input_outer, inputs[1]
