"""Which layers of a plan get kernels that quantize their output for the next layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fpcompiler.codegen import cutlass
from fpcompiler.codegen.cutlass.quantized import (
    QuantizedOutput,
    why_not_on,
    why_not_quantized,
)
from fpcompiler.codegen.problem import Rows
from fpcompiler.operand import Operand
from fpcompiler.plan import Plan
from fpcompiler.runtime.cuda.form import InputKind
from fpcompiler.runtime.cuda.pairs import WHOLE_ROWS, output_pairs, quantizing_of
from fpcompiler.runtime.layer_steps import arguments_of, shared_quantizers
from fpcompiler.runtime.ops import LINEAR_STEP

__all__ = ["quantized_outputs"]


def quantized_outputs(
    plan: Plan, layers: Mapping[str, Mapping[Rows, object] | str], outputs: Mapping[str, int]
) -> dict[str, dict[Rows, cutlass.Instance]]:
    """Return the kernels that quantize outputs, by layer and range of rows.

    Args:
        plan: The plan.
        layers: The kernels that layers have without, or why they have none.
        outputs: How many outputs each layer has.
    """
    kinds = {}
    for index, step in enumerate(plan.steps):
        given = arguments_of(step) if step.op == LINEAR_STEP else None
        rows = layers.get(step.layer, "")
        if given is None or isinstance(rows, str) or not given.x_operand:
            continue
        first = next(iter(rows.values()))
        if isinstance(first, cutlass.Instance):
            kinds[index] = InputKind(Operand.parse(given.x_operand), given.k, first.a)
    shared = shared_quantizers(plan, kinds)
    found: dict[str, dict[Rows, cutlass.Instance]] = {}
    for index, quantizer in output_pairs(plan, shared).items():
        layer, kind = plan.steps[index].layer, kinds[shared[quantizer]]
        made = quantizing_of(plan.steps[quantizer])
        own = layers.get(layer, "")
        if made is None or isinstance(own, str) or outputs[layer] % WHOLE_ROWS or not kind.operand:
            continue
        same = kind.element == kind.operand.format.name
        if not same or why_not_quantized(kind.operand, made.producer):
            continue
        quantized = QuantizedOutput(made.operand, made.producer)
        instances = {
            rows: replace(instance, quantized=quantized)
            for rows, instance in own.items()
            # One that adds a residual at another call would not be the same kernel without.
            if isinstance(instance, cutlass.Instance)
            and not instance.residual
            and not why_not_on(instance.machine.collectives, quantized)
        }
        if instances:
            found[layer] = instances
    return found
