"""``round-weights{unit=layer}``: each layer's roundings by the error of its own output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from fpcompiler.calibration import Group, InputStatistics, input_groups
from fpcompiler.ir.program import Program
from fpcompiler.numerics import pack
from fpcompiler.numerics.adaround import Ended, LayersResult, RoundOptions, SoftWeight, round_layers
from fpcompiler.numerics.held_out import split
from fpcompiler.passes.base import PassContext
from fpcompiler.passes.learned import Learned
from fpcompiler.passes.weights import OpenWeight, OpenWeights


def learn_layers(
    program: Program,
    weights: OpenWeights,
    context: PassContext,
    options: RoundOptions,
    label: str,
) -> list[Learned]:
    """Learn the roundings of each layer, with the inputs that the original model has.

    Layers of equal shape that share an input are learned at once. The last quarter of the sampled
    tokens is held out and decides.

    Args:
        program: At stage ``quantized``.
        weights: Of this program. A weight that multiplies several inputs is left.
        context: With calibration data.
        options: How to learn; ``seconds`` is for all layers together.
        label: The text of the pass.

    Raises:
        PassError: If there is no calibration data.
        NumericsError: If an input holds NaN or infinity; the layer is named.
    """
    groups = [group for group in input_groups(program) if weights.own(group)]
    work = _Work(weights, groups, options)
    results = context.calibrated(label).visit(
        program, groups, work, label=label, progress=context.progress
    )
    return [
        Learned.of(weight.layer, [weight], _without(f"{number}.", results[group.name]))
        for group in groups
        for number, weight in enumerate(weights.own(group))
    ]


class _Work:
    def __init__(
        self, weights: OpenWeights, groups: Sequence[Group], options: RoundOptions
    ) -> None:
        self._weights = weights
        self._options = options
        self._end = None if options.seconds is None else time.monotonic() + options.seconds
        self._sizes = {group.name: group.weights for group in groups}

    def __call__(self, group: Group, statistics: InputStatistics) -> dict[str, Tensor]:
        seen = self._weights.statistics(group, statistics)
        grams = split(seen.gram, seen.sample, layer=group.name)
        seconds = self._seconds(group)
        result: dict[str, Tensor] = {}
        stacks = _alike(self._weights.own(group))
        for alike in stacks:
            share = None if seconds is None else seconds / len(stacks)
            options = replace(self._options, seconds=share)
            opened = [self._weights.opened(weight, seen.gram.device) for _, weight in alike]
            found = _round(alike, opened, [gram.float() for gram in grams], options)
            for index, (number, weight) in enumerate(alike):
                result |= _encoded(f"{number}.", index, weight, found)
        return result

    def _seconds(self, group: Group) -> float | None:
        """Return this group's part of the time that is left; the least there is if it is over."""
        if self._end is None:
            return None
        # Groups come in order, without those that a run that was killed has finished.
        names = list(self._sizes)
        left = sum(self._sizes[name] for name in names[names.index(group.name) :])
        own = self._sizes[group.name]
        return max((self._end - time.monotonic()) * own / max(left, 1), 1e-3)


def _alike(weights: Sequence[OpenWeight]) -> list[list[tuple[int, OpenWeight]]]:
    """Return the weights with their numbers, those of equal type together."""

    def kind(item: tuple[int, OpenWeight]) -> str:
        return str(item[1].kind)

    return [list(group) for _, group in groupby(sorted(enumerate(weights), key=kind), kind)]


def _round(
    alike: Sequence[tuple[int, OpenWeight]],
    opened: Sequence[tuple[Tensor, tuple[Tensor, ...]]],
    grams: Sequence[Tensor],
    options: RoundOptions,
) -> LayersResult:
    weight = alike[0][1]
    values, scales = zip(*opened, strict=True)
    soft = SoftWeight.stacked(
        values, scales, weight.operand, parametrization=options.parametrization, layer=weight.layer
    )
    gram, held_out = (matrix.expand(len(opened), -1, -1) for matrix in grams)
    return round_layers(torch.stack(values), soft, gram, held_out, options, layer=weight.layer)


def _encoded(prefix: str, index: int, weight: OpenWeight, found: LayersResult) -> dict[str, Tensor]:
    bits = weight.operand.format.storage_bits
    result = {
        "codes.0": pack(found.codes[index], bits).cpu(),
        "errors": torch.stack([found.nearest_error[index], found.error[index]]).double().cpu(),
        "kept": found.kept[index].cpu(),
        "iterations": torch.tensor(found.iterations),
        "ended": torch.tensor(list(Ended).index(found.ended)),
    }
    return {prefix + key: value for key, value in result.items()}


def _without(prefix: str, result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in result.items() if key.startswith(prefix)
    }
