"""``gptq``: round weights one input channel after the other, each making up for those before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fpcompiler.calibration import Group, InputStatistics, input_groups
from fpcompiler.ir.program import Program, Stage
from fpcompiler.numerics import pack
from fpcompiler.numerics.gptq import GptqFactor, factorize, gptq_factored
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.weights import OpenWeight, OpenWeights


@dataclass(frozen=True)
class Gptq(Pass):
    """Quantize weights with GPTQ (arXiv 2210.17323) on the grid of their format.

    Scales are those that a search has found, or the operand's own; they are fixed before the first
    channel is rounded. A row that would not get better keeps rounding to nearest, and so does a
    weight that multiplies several inputs.

    Attributes:
        act_order: Whether channels with large inputs come first.
        damping: Added to the diagonal of ``x^T x``, relative to its mean.
    """

    name: ClassVar[str] = "gptq"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    act_order: bool = True
    damping: float = 0.01

    def run(self, program: Program, context: PassContext) -> None:
        """Quantize every open weight.

        Raises:
            PassError: If there is no calibration data.
            NumericsError: If the inputs of a layer leave nothing to work with; it is named.
        """
        calibration = context.calibrated(self.name)
        every = input_groups(program)
        weights = OpenWeights(program, every)
        groups = [group for group in every if weights.own(group)]
        shared = len(weights.every()) - sum(len(weights.own(group)) for group in groups)
        context.count("weights left, since they multiply several inputs", shared)

        def work(group: Group, statistics: InputStatistics) -> dict[str, Tensor]:
            return self._group(weights, group, statistics)

        results = calibration.visit(
            program, groups, work, label=pass_text(self), progress=context.progress
        )
        for group in groups:
            _describe(group, weights)
            for number, weight in enumerate(weights.own(group)):
                found = results[group.name]
                scales = [
                    found[f"{number}.scale{level}"] for level in range(len(weight.operand.levels))
                ]
                weights.store(weight, found[f"{number}.codes"], scales, context)

    def _group(
        self, weights: OpenWeights, group: Group, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        gram = weights.statistics(group, statistics).gram
        factor = factorize(gram, act_order=self.act_order, damping=self.damping, layer=group.name)
        result: dict[str, Tensor] = {}
        for number, weight in enumerate(weights.own(group)):
            codes, scales = _rounded(weights, weight, factor)
            result[f"{number}.codes"] = codes
            result |= {f"{number}.scale{level}": scale for level, scale in enumerate(scales)}
        return result


def _describe(group: Group, weights: OpenWeights) -> None:
    rounded = {weight.layer for weight in weights.own(group)}
    for layer, name in zip(group.layers, group.names, strict=True):
        if name in rounded:
            add_note(layer, "weight rounded by gptq")


def _rounded(
    weights: OpenWeights, weight: OpenWeight, factor: GptqFactor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return packed codes and scales."""
    value = weights.value(weight).to(factor.order.device)
    given = weights.scales(weight)
    scales = None if given is None else tuple(scale.to(value.device) for scale in given)
    codes, scales = gptq_factored(value, factor, weight.operand, scales=scales, layer=weight.layer)
    return pack(codes, weight.operand.format.storage_bits), scales
