"""``share-scales``: one scale of the tensor for the weights that share an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from fpcompiler.calibration import input_groups
from fpcompiler.ir.dialect import EncodeOp
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.stored import store_scales
from fpcompiler.numerics.given import is_nested, shared_power_scales
from fpcompiler.passes.base import Pass, PassContext
from fpcompiler.passes.weights import OpenWeights


@dataclass(frozen=True)
class ShareScales(Pass):
    """Give weights that share an input one scale of the tensor, a power of two.

    That is what servers of NVFP4 checkpoints need: they run q, k and v, or gate and up, as one
    layer with one such scale, and store its reciprocal. Of a power of two that is exact, and so are
    the values of the weights in bf16. It costs at most one of the 15 binades of scales of blocks.
    Weights without a scale of the tensor stay as they are.
    """

    name: ClassVar[str] = "share-scales"
    requires: ClassVar[Stage] = Stage.QUANTIZED

    def run(self, program: Program, context: PassContext) -> None:
        """Find the scales of every group."""
        groups = input_groups(program)
        weights = OpenWeights(program, groups)
        weights.require_unsearched(self.name, groups)
        for group in groups:
            own = [weight for weight in weights.of(group) if is_nested(weight.operand)]
            for operand in dict.fromkeys(weight.operand for weight in own):
                alike = [weight for weight in own if weight.operand == operand]
                values = [weights.value(weight) for weight in alike]
                found = shared_power_scales(values, operand, layer=group.name)
                for weight, scales in zip(alike, found, strict=True):
                    with ir.InsertionPoint(weight.op), weight.op.location:
                        stored = store_scales(
                            program, f"{weight.layer}.weight", weight.kind, scales
                        )
                        new = EncodeOp(weight.op.operands[0], *stored, weight.kind.to_mlir())
                    weight.op.results[0].replace_all_uses_with(new.result)
                    weight.op.erase()
                context.count("groups of weights with one scale")
                context.count("weights", len(alike))
