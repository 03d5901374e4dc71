"""``quantize-weights``: round each weight that is still open, and store its codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import Tensor

from fpcompiler import numerics
from fpcompiler.calibration import input_groups
from fpcompiler.errors import PassError
from fpcompiler.ir.program import Program, Stage
from fpcompiler.passes.base import Pass, PassContext
from fpcompiler.passes.weights import OpenWeight, OpenWeights

_CLIPS: Final = ("max", "mse")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round the weights to nearest and pack them.

    A weight whose scales a search has found is rounded with these.

    Attributes:
        clip: How the real scale of a row is chosen otherwise: ``max`` maps the largest magnitude
            to the largest code; ``mse`` searches the clip that gives the least squared error,
            which is never more than that of ``max``. Scales of blocks follow the rounding that the
            operand names, in both cases.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    clip: str = "max"

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            PassError: If there is no such clip.
        """
        if self.clip not in _CLIPS:
            raise PassError(f"{self.name}: clip must be one of {', '.join(_CLIPS)}: {self.clip!r}")

    def run(self, program: Program, context: PassContext) -> None:
        """Quantize every open weight, in program order."""
        weights = OpenWeights(program, input_groups(program))
        found = weights.every()
        for weight in context.progress(found, len(found), "quantizing weights"):
            packed, scales = self._rounded(weight, weights.value(weight), weights.scales(weight))
            weights.store(weight, packed, scales, context)

    def _rounded(
        self, weight: OpenWeight, value: Tensor, given: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        operand, layer = weight.operand, weight.layer
        if given is not None:
            codes = numerics.quantize_with(value, given, operand, layer=layer)
            return numerics.pack(codes, operand.format.storage_bits), given
        if self.clip == "mse":
            value = numerics.clip(value, operand, layer=layer)
        return numerics.quantize_packed(value, operand, layer=layer)
