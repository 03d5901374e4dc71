"""Layers whose output only a quantizer reads, and that may quantize it themselves.

A plan is not changed for them: where the kernels of an artifact do both steps at once, the layer
gives what the quantizer would, and the quantizer passes it on. Anything else runs the two steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.layer_steps import arguments_of, readers_of
from fpcompiler.runtime.ops import LINEAR_STEP

WHOLE_ROWS: Final = 128
"""Outputs of such a layer are a multiple of it: what the next layer's kernels pad rows to."""


class Quantizing(NamedTuple):
    """What a quantizer makes of a layer's output.

    Attributes:
        operand: The text of its operand.
        producer: The activation that it computes before; empty for none.
    """

    operand: str
    producer: str


def output_pairs(plan: Plan, shared: Mapping[int, int]) -> dict[int, int]:
    """Return the quantizers that are all that reads a layer's output.

    Args:
        plan: The plan.
        shared: Quantizers whose results only known layers read, as
            :func:`fpcompiler.runtime.layer_steps.shared_quantizers` returns them.

    Returns:
        The index of the quantizer's step by that of the layer's.
    """
    makers = {out: index for index, step in enumerate(plan.steps) for out in step.outs}
    readers = readers_of(plan)
    found = {}
    for index in shared:
        first = plan.steps[index].args[0]
        maker = makers.get(first["v"]) if isinstance(first, dict) and "v" in first else None
        if maker is None or readers[maker] != [index] or not _gives_output(plan.steps[maker]):
            continue
        if quantizing_of(plan.steps[index]) is not None:
            found[maker] = index
    return found


def quantizing_of(step: Step) -> Quantizing | None:
    """Return what a quantizer makes of one tensor; None if it reads others too."""
    if step.op == "fpc.quantize":
        return Quantizing(str(step.args[1]), "")
    beside, producer, operand = step.args[1:5], step.args[5], step.args[7]
    return None if any(value is not None for value in beside) else Quantizing(operand, producer)


def _gives_output(step: Step) -> bool:
    """Return whether a step is a layer that computes nothing of its output."""
    given = arguments_of(step) if step.op == LINEAR_STEP else None
    return given is not None and not given.activation and given.residual is None
