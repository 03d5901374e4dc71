"""The quantizers of a plan that GEMMs of a GPU read: what kernels for them compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.operand import Operand
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.cuda.form import InputKind
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.cuda.quantizers import problem_of
from fpcompiler.runtime.layer_steps import arguments_of, readers_of, reads_whole
from fpcompiler.runtime.operators import QUANTIZERS

__all__ = ["quantizers_of"]

_TYPES: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_VALUES: Final = 5
"""What a fused quantizer reads: x, and the producer's weight, bias, scale and shift."""


def quantizers_of(
    plan: Plan, tensors: Mapping[str, Tensor], elements: Mapping[str, str]
) -> dict[str, QuantizeProblem]:
    """Return what quantizes the input of each layer; none where no kernel can.

    The types of values that a call computes do not stand in a plan: they are taken to be those of
    the layer's result. Where that is wrong the runtime finds no kernel and lets torch quantize.

    Args:
        plan: The plan.
        tensors: The tensors that it names.
        elements: The element format in which the GEMM of a layer reads activations, by layer;
            layers without a GEMM are not in it.
    """
    found = {}
    readers = readers_of(plan)
    for index, step in enumerate(plan.steps):
        if step.op not in QUANTIZERS or step.kwargs:
            continue
        layers = [plan.steps[reader] for reader in readers[index] if reader >= 0]
        alone = len(layers) == len(readers[index]) and all(
            layer.layer in elements and reads_whole(layer, step) for layer in layers
        )
        if layers and alone:
            problem = _problem(step, layers[0], plan, tensors, elements[layers[0].layer])
            found.update({layer.layer: problem for layer in layers if problem is not None})
    return found


def _problem(
    step: Step, layer: Step, plan: Plan, tensors: Mapping[str, Tensor], element: str
) -> QuantizeProblem | None:
    given = arguments_of(layer)
    assert given is not None
    kind = InputKind(Operand.parse(given.x_operand), given.k, element)
    computed = getattr(torch, given.dtype["dtype"])
    values = step.args[:_VALUES] if len(step.args) > _VALUES else step.args[:1]
    types = [_type(value, plan, tensors, computed) for value in values]
    types += [""] * (_VALUES - len(types))
    producer = step.args[_VALUES] if len(step.args) > _VALUES else ""
    return problem_of(kind, producer, tuple(types))


def _type(value: Any, plan: Plan, tensors: Mapping[str, Tensor], computed: torch.dtype) -> str:
    if value is None:
        return ""
    key = plan.constants.get(value["v"])
    return _TYPES.get(computed if key is None else tensors[key].dtype, "?")
