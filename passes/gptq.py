"""``gptq``: round weights one input channel after the other, each making up for those before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fpcompiler.calibration import Group, InputStatistics, input_groups
from fpcompiler.ir.program import Program, Stage
from fpcompiler.numerics import pack, quantize, quantize_with
from fpcompiler.numerics.gptq import factorize, gptq_factored
from fpcompiler.numerics.held_out import (
    HeldOut,
    are_few,
    held_out_error,
    hold_out,
    shrinkage_damping,
)
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.weights import OpenWeight, OpenWeights


@dataclass(frozen=True)
class Gptq(Pass):
    """Quantize weights with GPTQ (arXiv 2210.17323) on the grid of their format.

    Scales are those that a search has found, or the operand's own; they are fixed before the first
    channel is rounded. A row that would not get better keeps rounding to nearest, and so does a
    weight that multiplies several inputs. With less than four tokens for each input of a layer
    a weight for which GPTQ does not lower the error on tokens that it has not seen keeps rounding
    to nearest, and with less than one there is more damping (:mod:`fpcompiler.numerics.held_out`).

    Attributes:
        act_order: Whether channels with large inputs come first.
        damping: Added to the diagonal of ``x^T x``, relative to its mean; at least.
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
            _store(weights, group, results[group.name], context)

    def _group(
        self, weights: OpenWeights, group: Group, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        seen = weights.statistics(group, statistics)
        few, damping = are_few(seen.tokens, group.k), self.damping
        if seen.tokens < group.k:  # the Hessian is singular
            damping = max(damping, shrinkage_damping(seen.gram, seen.tokens))
        factor = factorize(seen.gram, act_order=self.act_order, damping=damping, layer=group.name)
        held = None
        if few:
            held = hold_out(
                seen.gram, seen.sample, act_order=self.act_order, damping=damping, layer=group.name
            )
        result = {"few": torch.tensor(seen.tokens if few else 0)}
        for number, weight in enumerate(weights.own(group)):
            value, scales = _opened(weights, weight, seen.gram.device)
            nearest = held is not None and not _helps(value, scales, weight, held)
            round_weight = _nearest if nearest else partial(gptq_factored, factor=factor)
            codes, scales = round_weight(
                value, operand=weight.operand, scales=scales, layer=weight.layer
            )
            result[f"{number}.nearest"] = torch.tensor(nearest)
            result[f"{number}.codes"] = pack(codes, weight.operand.format.storage_bits)
            result |= {f"{number}.scale{level}": scale for level, scale in enumerate(scales)}
        return result


def _opened(
    weights: OpenWeights, weight: OpenWeight, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Return the values of a weight, and its scales if they are given."""
    given = weights.scales(weight)
    scales = None if given is None else tuple(scale.to(device) for scale in given)
    return weights.value(weight).to(device), scales


def _helps(
    value: Tensor, scales: tuple[Tensor, ...] | None, weight: OpenWeight, held: HeldOut
) -> bool:
    error = held_out_error(value, held, weight.operand, scales=scales, layer=weight.layer)
    return error < 1


def _nearest(
    value: Tensor, operand: Operand, scales: tuple[Tensor, ...] | None, layer: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if scales is None:
        return quantize(value, operand, layer=layer)
    return quantize_with(value, scales, operand, layer=layer), scales


def _store(
    weights: OpenWeights, group: Group, found: Mapping[str, Tensor], context: PassContext
) -> None:
    few = int(found["few"])
    context.count("inputs with few tokens, where gptq was checked on tokens held out", int(few > 0))
    reason = f" ({few} tokens for {group.k} inputs)" if few else ""
    for number, weight in enumerate(weights.own(group)):
        nearest = bool(found[f"{number}.nearest"])
        note = "rounded to nearest: gptq does not help" if nearest else "weight rounded by gptq"
        for linear in weight.linears:
            add_note(linear, note + reason)
        context.count("weights rounded to nearest, since gptq does not help", int(nearest))
        context.count("weights rounded by gptq", int(not nearest))
        levels = range(len(weight.operand.levels))
        scales = [found[f"{number}.scale{level}"] for level in levels]
        weights.store(weight, found[f"{number}.codes"], scales, context)
