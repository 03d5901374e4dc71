"""``smooth``: move part of the inputs' outliers into the weights (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor
from torch_mlir import ir

from fpcompiler.calibration import Group, InputStatistics, input_groups
from fpcompiler.errors import PassError
from fpcompiler.ir import build
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.stored import store_tensor
from fpcompiler.ir.types import TensorType, tensor_type
from fpcompiler.numerics.smooth import smooth_scales
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.weights import OpenWeights


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide quantized inputs by a factor per channel, and multiply the weights by it.

    ``s = amax(x)^alpha / amax(w)^(1 - alpha)`` per channel (SmoothQuant, arXiv 2211.10438, equation
    4). The input is divided at each call, once for layers that share it.

    Attributes:
        alpha: How much of the outliers moves: 0 none, 1 all.
        power_of_two: Whether factors are rounded to powers of two, with which both the division
            and the product are exact.
    """

    name: ClassVar[str] = "smooth"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    alpha: float = 0.5
    power_of_two: bool = False

    def __post_init__(self) -> None:
        """Check the exponent.

        Raises:
            PassError: If it is not between 0 and 1.
        """
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha must be between 0 and 1, not {self.alpha}")

    def run(self, program: Program, context: PassContext) -> None:
        """Smooth every group of layers with a quantized input and weights that are all open.

        Raises:
            PassError: If there is no calibration data.
            NumericsError: If an input holds NaN or infinity; the layer is named.
        """
        calibration = context.calibrated(self.name)
        every = input_groups(program)
        weights = OpenWeights(program, every)
        weights.require_unsearched(self.name, every)
        groups = [g for g in every if g.quantize is not None and weights.are_whole(g)]
        context.count("groups of layers not smoothed", len(every) - len(groups))
        found = calibration.visit(
            program,
            groups,
            partial(self._factors, weights),
            label=pass_text(self),
            progress=context.progress,
        )
        for group in groups:
            _divide(program, group, found[group.name]["factors"])
            for weight in weights.of(group):
                value = weights.value(weight)
                weights.replace(weight, value * found[group.name]["factors"].to(value), "smoothed")
            for layer in group.layers:
                add_note(layer, "outliers of the input moved to the weight")
            context.count("groups of layers smoothed")

    def _factors(
        self, weights: OpenWeights, group: Group, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        device = statistics.amax.device
        values = [weights.value(weight).to(device) for weight in weights.of(group)]
        factors = smooth_scales(
            statistics.amax,
            values,
            alpha=self.alpha,
            power_of_two=self.power_of_two,
            layer=group.name,
        )
        return {"factors": factors}


def _divide(program: Program, group: Group, factors: Tensor) -> None:
    quantize = group.quantize
    assert quantize is not None
    kind = tensor_type(group.x)
    assert kind is not None
    with ir.InsertionPoint(quantize), quantize.location:
        name = f"{group.name}.input.smoothing"
        divisor = store_tensor(
            program, name, factors.to(kind.dtype), TensorType((group.k,), kind.element)
        )
        quantize.operands[0] = build.aten("div.Tensor", [group.x, divisor], kind)
