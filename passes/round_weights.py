"""``round-weights``: learn for each weight whether it is rounded up or down (AdaRound-FP)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from fpcompiler.calibration import Calibration, input_groups, raise_learnable
from fpcompiler.errors import PassError
from fpcompiler.ir.program import Program, Stage
from fpcompiler.numerics.adaround import Ended, Parametrization, RoundOptions
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.candidates import check_choice
from fpcompiler.passes.learned import Learned
from fpcompiler.passes.round_by_layer import learn_layers
from fpcompiler.passes.weights import OpenWeight, OpenWeights
from fpcompiler.reconstruction import Rounding, Settings, Walk
from fpcompiler.streams import Result

_ITERATIONS: Final = {"block": 2500, "layer": 300}
_INPUTS: Final = ("quantized", "float")
_PARAMETRIZATIONS: Final = tuple(item.value for item in Parametrization)
_SECONDS: Final = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Learn roundings (AdaRound, arXiv 2004.10568, for floating point: FP4DiT, arXiv 2503.15465).

    The roundings of a block of the model are learned together, by the error of its output. Its
    inputs are those that the model has whose blocks before are rounded already, its targets what
    the original model gives. Scales are those that a search has found, or the operand's own. A
    block that is not better on batches that were held out keeps rounding to nearest, and so do
    weights that blocks share.

    Attributes:
        unit: ``block``; or ``layer``, which learns each layer by its own output, with the inputs of
            the original model. That takes a small part of the time.
        iterations: Steps at most for each unit; 0 for 2500 steps of one batch for a block, and 300
            of all tokens for a layer.
        budget: About what all of it may take, such as ``5min``; the result depends on the machine
            then. Empty for no limit.
        inputs: ``quantized`` learns blocks with activations quantized as the program says;
            ``float`` without that, as the paper does.
        parametrization: ``logit``, or ``scale-aware`` as in the paper.
    """

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    unit: str = "block"
    iterations: int = 0
    budget: str = ""
    inputs: str = "quantized"
    parametrization: str = "logit"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If one has an unusable value.
        """
        check_choice(self.name, "unit", self.unit, tuple(_ITERATIONS))
        check_choice(self.name, "inputs", self.inputs, _INPUTS)
        check_choice(self.name, "parametrization", self.parametrization, _PARAMETRIZATIONS)
        if self.unit == "layer" and self.inputs != type(self).inputs:
            raise PassError(f"{self.name}: inputs is for unit=block; a layer has one input.")
        if self.iterations < 0:
            raise PassError(f"{self.name}: iterations must not be negative: {self.iterations}")
        self.seconds()

    def seconds(self) -> float | None:
        """Return the budget in seconds, or None.

        Raises:
            PassError: If it is no length of time.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", self.budget.lower())
        if not self.budget:
            return None
        if not match or match[2] not in _SECONDS or not float(match[1]) > 0:
            raise PassError(
                f"{self.name}: {self.budget!r} is no length of time; write for instance 90s, 5min "
                "or 1h."
            )
        return float(match[1]) * _SECONDS[match[2]]

    def run(self, program: Program, context: PassContext) -> None:
        """Round the weights of every unit.

        Raises:
            PassError: If there is no calibration data, or for blocks only one batch.
            NumericsError: If what a unit reads or gives is not finite; it is named.
        """
        weights = OpenWeights(program, input_groups(program))
        count = len(weights.every())
        if not count and program.operations("fpq.linear"):
            raise PassError(f"{self.name}: all weights are rounded already; put it before that.")
        if self.unit == "layer":
            text = pass_text(self)
            learned = learn_layers(program, weights, context, self._options(), text)
        else:
            learned = self._blocks(program, weights, context)
        for found in learned:
            for weight, codes in zip(found.weights, found.codes, strict=True):
                for linear in weight.linears:
                    add_note(linear, found.note)
                _, scales = weights.opened(weight, codes.device)
                weights.store(weight, codes, scales, context)
            self._count(found, context)
        left = count - sum(len(found.weights) for found in learned)
        context.count(f"weights left, since {self.unit}s share them", left)

    def _blocks(
        self, program: Program, weights: OpenWeights, context: PassContext
    ) -> list[Learned]:
        calibration = context.calibrated(self.name)
        if len(calibration.batches) < 2:
            raise PassError(
                f"{self.name} needs at least two batches of calibration data: one is not learned "
                "from and decides. Split the data into more batches, or take unit=layer."
            )
        names = {f"weight{number}": weight for number, weight in enumerate(weights.every())}
        graph = raise_learnable(program, {w.op: weights.value(w) for w in names.values()})
        rounding = {name: _rounding(weights, weight) for name, weight in names.items()}
        with calibration.workspace(program, pass_text(self)) as folder:
            walk = Walk(graph, rounding, calibration.batches, folder, self._settings(calibration))
            found = self.learn(walk, context)
        return [
            Learned.of(unit.name, [names[name] for name in unit.weights], found[unit.name])
            for unit in walk.units
        ]

    def learn(self, walk: Walk, context: PassContext) -> Mapping[str, Result]:
        """Return the results of all blocks; a subclass may have them made elsewhere."""
        return walk.run(context.progress, self.name, context.calibrated(self.name).report)

    def _settings(self, calibration: Calibration) -> Settings:
        return Settings(
            self._options(),
            calibration.device,
            quantized_inputs=self.inputs == "quantized",
            max_memory=calibration.max_memory,
            seed=calibration.seed,
            seconds=self.seconds(),
        )

    def _options(self) -> RoundOptions:
        return RoundOptions(
            iterations=self.iterations or _ITERATIONS[self.unit],
            parametrization=Parametrization(self.parametrization),
            seconds=self.seconds(),
        )

    def _count(self, found: Learned, context: PassContext) -> None:
        units = f"{self.unit}s"
        context.count(f"roundings learned: {units}", found.kept)
        context.count(f"rounded to nearest, since learning does not help: {units}", not found.kept)
        context.count("iterations", found.iterations)
        shortened = found.ended is Ended.TIME
        context.count(f"fewer iterations, for the time given: {units}", shortened)


def _rounding(weights: OpenWeights, weight: OpenWeight) -> Rounding:
    _, scales = weights.opened(weight, torch.device("cpu"))
    return Rounding(weight.layer, weight.operand, scales)
