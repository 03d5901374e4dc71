"""``mixed-formats``: wider weights where they help the model most, within a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch_mlir import ir

from fpcompiler import target as targets
from fpcompiler.calibration import Group, InputStatistics, SquaredGradients, input_groups
from fpcompiler.errors import PassError
from fpcompiler.ir.dialect import QuantizeOp
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.types import QuantizedType, quantized_type
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.numerics.mixed import Frontier, Point, model_damage, output_damage, stored_bits
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.candidates import CHOICES, WIDTHS, check_choice, of_widths
from fpcompiler.passes.mixed_report import Choices, Layer, report
from fpcompiler.passes.weights import OpenWeight, OpenWeights, kind_of

_SENSITIVITIES: Final = ("fisher", "mse")
_MOST: Final = 10.0
"""Eight bits and an fp32 scale for each 16 values: what takes more is no compression."""


@dataclass(frozen=True)
class MixedFormats(Pass):
    """Choose the width of each weight, 4, 6 or 8 bits, within a budget for all of them together.

    Each layer's weight is rounded to nearest in every format that the target can run with the
    layer's input, scales as the scheme has them, and the damage is predicted. The choice with the
    least sum of damages is exact, but for very many different sizes
    (:class:`fpcompiler.numerics.mixed.Frontier`). What is searched or rounded later works with the
    formats chosen; ``preshift`` may store weights in wider ones. A weight that multiplies several
    inputs keeps its format, and counts.

    Attributes:
        effective_bits: The budget: bits of all quantized weights in the artifact, scales included,
            divided by the number of values.
        sensitivity: What is predicted. ``fisher``: the squared change of the model's output, from
            the model's derivatives; ``mse``: the squared error of the layer's output relative to
            its squares, every layer as important as any other.
        formats: For a weight that keeps its width: ``same-bits`` chooses among the formats of that
            width, ``given`` keeps the given one. In other widths the best is chosen.
        target: Name of the target.
    """

    name: ClassVar[str] = "mixed-formats"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    effective_bits: float = 4.5
    sensitivity: str = "fisher"
    formats: str = "same-bits"
    target: str = "reference"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If the budget is none that weights can have, or there is no such choice.
        """
        if not min(WIDTHS) <= self.effective_bits <= _MOST:
            raise PassError(
                f"{self.name}: effective_bits must be from {min(WIDTHS)} to {_MOST:g}, bits for "
                f"each weight with its part of the scales, such as 4.5: {self.effective_bits!r}"
            )
        check_choice(self.name, "sensitivity", self.sensitivity, _SENSITIVITIES)
        check_choice(self.name, "formats", self.formats, CHOICES)

    def run(self, program: Program, context: PassContext) -> None:
        """Choose, rewrite the weights that change, and report what else there was to choose.

        Raises:
            PassError: If there is no calibration data, scales have been searched already, or the
                budget cannot be reached; the least that can be is named.
            NumericsError: If a weight or an input holds NaN or infinity; the layer is named.
        """
        every = input_groups(program)
        weights = OpenWeights(program, every)
        weights.require_unsearched(self.name, every)
        context.count("groups left: shifted already", sum(map(weights.folded, every)))
        groups = [group for group in every if weights.own(group) and not weights.folded(group)]
        if not every:
            return
        damages = self._damages(program, context, groups, weights)
        users = [(group, weight) for group in groups for weight in weights.own(group)]
        layers = [
            self._layer(group, weight, damages[group.name][weight.layer]) for group, weight in users
        ]
        choices = _choices(program, layers, [weight.op.results[0] for _, weight in users])
        point = self._best(choices)
        for (_, weight), layer, number in zip(users, layers, point.chosen, strict=True):
            context.count(f"weights in {layer.operands[number].format}")
            context.count("weights that another format was chosen for", int(number > 0))
            if number:
                _rewrite(weight, layer.operands[number], layer.relative(number))
        context.reports.append(report(choices, point, self.effective_bits, self.sensitivity))

    def _damages(
        self,
        program: Program,
        context: PassContext,
        groups: Sequence[Group],
        weights: OpenWeights,
    ) -> Mapping[str, Mapping[str, Tensor]]:
        calibration = context.calibrated(self.name)
        # Without the budget, so that another one finds the same work done in a folder.
        label = pass_text(replace(self, effective_bits=type(self).effective_bits))
        work = partial(self._measure, weights)
        with ExitStack() as stack:
            if self.sensitivity == "fisher" and groups:
                gradients = stack.enter_context(
                    calibration.squared_gradients(program, label=label, progress=context.progress)
                )
                work = partial(work, gradients=gradients)
            return calibration.visit(program, groups, work, label=label, progress=context.progress)

    def _measure(
        self,
        weights: OpenWeights,
        group: Group,
        statistics: InputStatistics,
        gradients: SquaredGradients | None = None,
    ) -> dict[str, Tensor]:
        result = {}
        for weight in weights.own(group):
            value = weights.value(weight).to(statistics.gram.device)
            if gradients is None:
                damage = partial(output_damage, value, gram=statistics.gram)
            else:
                damage = partial(
                    model_damage, value, sample=statistics.sample,
                    gradients=gradients.of(weight.layer), tokens=statistics.tokens,
                    layer=weight.layer,
                )  # fmt: skip
            losses = [
                damage(dequantize(*quantize(value, operand, layer=weight.layer), operand))
                for operand in self._operands(group, weight)
            ]
            result[weight.layer] = torch.tensor(losses, dtype=torch.float64)
        return result

    def _operands(self, group: Group, weight: OpenWeight) -> list[Operand]:
        target = targets.lookup(self.target)
        given = None if group.quantize is None else kind_of(group.quantize).operand
        return of_widths(target, weight.operand, given, self.formats)

    def _layer(self, group: Group, weight: OpenWeight, damages: Tensor) -> Layer:
        operands = self._operands(group, weight)
        sizes = (_stored_bits(replace(weight.kind, operand=operand)) for operand in operands)
        return Layer(weight.layer, tuple(operands), tuple(sizes), tuple(damages.tolist()))

    def _best(self, choices: Choices) -> Point:
        """Return what has the least damage within the budget.

        Raises:
            PassError: If nothing is within it, or nothing has any damage.
        """
        if self.sensitivity == "fisher" and choices.layers and not choices.given.damage:
            raise PassError(
                f"{self.name}: no rounded weight is predicted to change the model's output, so "
                "there is nothing to choose by: outputs that are no floating-point numbers have no "
                "derivatives. Use sensitivity=mse."
            )
        room = math.floor(self.effective_bits * choices.values * (1 + 1e-12)) - choices.fixed
        if room < choices.frontier.least:
            least = math.ceil(choices.bits(choices.frontier.least) * 1000) / 1000
            raise PassError(
                f"{self.name}: effective_bits={self.effective_bits:g} cannot be reached: with "
                f"every weight in its narrowest format it is {least:.3f}, scales included. Give "
                f"{least:.3f} or more, or a scheme with fewer scales."
            )
        return choices.frontier.within(room)


def _choices(program: Program, layers: Sequence[Layer], own: Sequence[ir.Value]) -> Choices:
    """Return what is possible, with the weights that keep their format counted.

    Args:
        program: The program.
        layers: What is possible for each weight.
        own: These weights.
    """
    every = {linear.operands[1] for linear in program.operations("fpq.linear")}
    kinds = [kind for kind in map(quantized_type, every) if kind is not None]
    left = [kind for kind in map(quantized_type, every - set(own)) if kind is not None]
    return Choices(
        tuple(layers),
        Frontier([layer.sizes for layer in layers], [layer.damages for layer in layers]),
        fixed=sum(map(_stored_bits, left)),
        values=sum(math.prod(size or 0 for size in kind.shape) for kind in kinds),
    )


def _stored_bits(kind: QuantizedType) -> int:
    *rows, k = (size or 0 for size in kind.shape)
    return stored_bits(math.prod(rows), k, kind.operand)


def _rewrite(weight: OpenWeight, operand: Operand, damage: float) -> None:
    """Quantize a weight to another format, and say so at the layers that use it."""
    before, op = weight.kind, weight.op
    kind = replace(before, operand=operand)
    with ir.InsertionPoint(op), op.location:
        new = QuantizeOp(op.operands[0], kind.to_mlir()).result
    op.results[0].replace_all_uses_with(new)
    op.erase()
    names = operand.format.short, before.operand.format.short
    for use in new.uses:
        add_note(
            use.owner.operation,
            f"{names[0]} instead of {names[1]}: {damage:.0%} of the predicted damage",
        )
