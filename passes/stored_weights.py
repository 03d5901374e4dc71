"""``stored-weights``: take codes and scales from a checkpoint instead of quantizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch_mlir import ir

from fpcompiler.calibration import Group, input_groups
from fpcompiler.errors import PassError, describe_layer
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.numerics import dequantize_packed
from fpcompiler.passes.base import Pass, PassContext, StoredWeight
from fpcompiler.passes.static_inputs import encode_within
from fpcompiler.passes.weights import OpenWeight, OpenWeights


@dataclass(frozen=True)
class StoredWeights(Pass):
    """Store the weights of a checkpoint bit for bit, and the static scales of inputs.

    The model was loaded with the values of the checkpoint's weights. Each open weight of the
    program is compared with them, so that codes end up where their values are, and nowhere else.
    """

    name: ClassVar[str] = "stored-weights"
    requires: ClassVar[Stage] = Stage.QUANTIZED

    def run(self, program: Program, context: PassContext) -> None:
        """Store every open weight.

        Raises:
            PassError: If there is no checkpoint, a weight is not in it, or one of it has no layer.
        """
        if not context.stored:
            raise PassError(
                f"{self.name} needs the weights of a checkpoint: fpcompiler import FOLDER."
            )
        groups = input_groups(program)
        weights = OpenWeights(program, groups)
        missing = {*context.stored}
        for weight in weights.every():
            stored = context.stored.get(weight.layer)
            if stored is None:
                raise PassError(
                    f"{describe_layer(weight.layer)}: the checkpoint has no codes of it."
                )
            _require_equal(weights, weight, stored)
            weights.store(weight, stored.packed, stored.scales, context)
        for group in groups:
            missing -= {*group.names}
            _fix_input(program, group, context.stored)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise PassError(
                f"the checkpoint has codes for {len(missing)} layers that are none of the compiled "
                f"model, or do not run in its example call: {some}."
            )


def _require_equal(weights: OpenWeights, weight: OpenWeight, stored: StoredWeight) -> None:
    """Check that a weight of the program has the values that its codes stand for."""
    value, (n, k) = weights.value(weight), weight.kind.shape
    same = stored.packed.shape[0] == n and value.shape[-1] == k
    if same:
        values = dequantize_packed(stored.packed, stored.scales, weight.operand, k or 0)
        same = torch.equal(values.to(value.dtype), value.cpu())
    if not same:
        raise PassError(
            f"{describe_layer(weight.layer)}: the model changes this weight before it multiplies "
            "(it is transposed, scaled, or joined with another), so its codes cannot be "
            "carried over."
        )


def _fix_input(program: Program, group: Group, stored: Mapping[str, StoredWeight]) -> None:
    """Give the input of a group the static scale of its layers, or each layer its own."""
    if group.quantize is None:
        return
    inputs: dict[float, ir.Value] = {}
    for layer in group.layers:
        name = text_of(layer.attributes["layer"])
        outer = stored[name].input_outer if name in stored else None
        if outer is None:
            continue
        key = float(outer)
        if key not in inputs:
            inputs[key] = encode_within(program, group.quantize, name, outer)
        layer.operands[0] = inputs[key]
    if inputs and next(iter(group.quantize.results[0].uses), None) is None:
        group.quantize.erase()
