"""Where learning the roundings of a unit begins: each layer rounded for itself.

A layer by itself is learned with the Gram matrix of its inputs, in a small part of the time that
steps through a block take. *Measured* on blocks of the DiT in ``examples/dit``, w4a4, the error of
the block's output relative to round-to-nearest: 0.61 and 0.89 for the layers alone; 0.52 and 0.80
after 100 steps from there, 0.73 and 0.85 after 100 steps from the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fpcompiler.numerics.adaround import RoundOptions, SoftWeight, round_layers
from fpcompiler.reconstruction.samples import StoredSamples
from fpcompiler.reconstruction.subgraph import UnitFunction
from fpcompiler.reconstruction.units import Unit

_ITERATIONS: Final = 100
_SHARE: Final = 0.25
"""Of the time for a unit."""


def layer_codes(
    unit: Unit,
    function: UnitFunction,
    weights: Sequence[Tensor],
    scales: Sequence[tuple[Tensor, ...]],
    soft: Sequence[SoftWeight],
    samples: tuple[StoredSamples, StoredSamples],
    options: RoundOptions,
) -> list[Tensor | None]:
    """Return the roundings of each layer by the error of its own output.

    Args:
        unit: The unit.
        function: Of the unit.
        weights: The original weights, in the order of the unit's.
        scales: Of each.
        soft: The neighbours of each.
        samples: To learn from, and held out.
        options: How to learn; ``seconds`` is for the unit.

    Returns:
        Codes like those of ``soft``; None for a weight that does more than multiply one input.
    """
    grams, held_out = (_grams(function, weights, part) for part in samples)
    seconds = options.seconds
    own = replace(
        options,
        iterations=min(_ITERATIONS, options.iterations),
        seconds=None if seconds is None else _SHARE * seconds / max(len(grams), 1),
    )
    pairs = iter(zip(grams, held_out, strict=True))
    found: list[Tensor | None] = []
    for weight, levels, one, read in zip(weights, scales, soft, unit.reads, strict=True):
        if read is None:
            found.append(None)
            continue
        stack = SoftWeight.stacked(
            [weight], [levels], one.operand, parametrization=options.parametrization
        )
        gram, held = next(pairs)
        result = round_layers(weight[None], stack, gram[None], held[None], own, layer=unit.name)
        found.append(result.codes[0])
    return found


def _grams(
    function: UnitFunction, weights: Sequence[Tensor], samples: StoredSamples
) -> list[Tensor]:
    """Return the sum of ``x^T x`` for each layer, with the original weights in the unit."""
    sums: list[Tensor] = []
    for index in range(len(samples)):
        inputs, _ = samples.batch([index])
        rows = [x.reshape(-1, x.shape[-1]).float() for x in function.reads(weights, inputs)]
        if not sums:
            sums = [torch.zeros(x.shape[-1], x.shape[-1], device=x.device) for x in rows]
        for total, x in zip(sums, rows, strict=True):
            total.addmm_(x.T, x)
    return sums
