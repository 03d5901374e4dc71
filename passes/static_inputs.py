"""``static-inputs``: find the scale of each input's tensor once, on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch_mlir import ir

from fpcompiler.calibration import Group, InputStatistics, input_groups
from fpcompiler.ir.build import constant
from fpcompiler.ir.dialect import EncodeOp, scale_texts
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.stored import store_builtin
from fpcompiler.numerics.given import is_nested, power_of_two
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.weights import kind_of


@dataclass(frozen=True)
class StaticInputs(Pass):
    """Give inputs a scale of the tensor that no longer depends on the call.

    That is how NVFP4 is served: scales of blocks are computed at each call, within a scale of the
    tensor from calibration data. It is a power of two, so that its reciprocal, which checkpoints
    hold, is exact. Inputs without a scale of the tensor stay as they are.
    """

    name: ClassVar[str] = "static-inputs"
    requires: ClassVar[Stage] = Stage.QUANTIZED

    def run(self, program: Program, context: PassContext) -> None:
        """Find and fix the scales.

        Raises:
            PassError: If there is no calibration data.
            NumericsError: If an input holds NaN or infinity; the layer is named.
        """
        groups = [group for group in input_groups(program) if _takes_static(group)]
        if not groups:
            return
        calibration = context.calibrated(self.name)
        found = calibration.visit(
            program, groups, _outer, label=pass_text(self), progress=context.progress
        )
        for group in groups:
            assert group.quantize is not None
            outer = found[group.name]["outer"]
            value = encode_within(program, group.quantize, group.name, outer)
            group.quantize.results[0].replace_all_uses_with(value)
            group.quantize.erase()
            for layer in group.layers:
                add_note(layer, f"static scale of the input: 2**{int(outer.log2())}")
            context.count("inputs with a static scale")


def _takes_static(group: Group) -> bool:
    op = group.quantize
    return op is not None and op.name == "fpq.quantize" and is_nested(kind_of(op).operand)


def _outer(group: Group, statistics: InputStatistics) -> dict[str, Tensor]:
    assert group.quantize is not None
    operand = kind_of(group.quantize).operand
    return {"outer": power_of_two(float(statistics.amax.max()), operand)}


def encode_within(program: Program, quantize: ir.Operation, name: str, outer: Tensor) -> ir.Value:
    """Return the input that an ``fpq.quantize`` quantizes, with a given scale of the tensor.

    Args:
        program: Gets the scale, as ``NAME.input.outer_scale``.
        quantize: What computes the scale so far.
        name: Of the layer.
        outer: fp32, one number.
    """
    kind = kind_of(quantize)
    with ir.InsertionPoint(quantize), quantize.location:
        scale = outer.reshape((1,) * len(kind.shape)).clone()
        stored = store_builtin(program, f"{name}.input.outer_scale", scale_texts(kind)[0], scale)
        blocks = constant(None)
        return EncodeOp(quantize.operands[0], stored, blocks, kind.to_mlir()).result
