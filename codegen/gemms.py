"""The GEMMs of a plan: what each quantized linear layer multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from fpcompiler.codegen.problem import Activation, OutputType
from fpcompiler.operand import Operand
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.ops import LinearArguments

__all__ = ["Gemm", "gemms_of"]

_OUTPUTS: Final = {
    "bfloat16": OutputType.BF16,
    "float16": OutputType.F16,
    "float32": OutputType.F32,
}


@dataclass(frozen=True)
class Gemm:
    """A linear layer of a plan.

    Attributes:
        layer: Its name.
        weight: The weights' operand.
        activation: The activations' operand; None for 16 bits or more.
        n: Output channels.
        k: Input channels.
        bias: Whether there is one.
        function: The activation function of its result.
        residual: Whether it adds a tensor at the end.
        output: The element type of its result.
    """

    layer: str
    weight: Operand
    activation: Operand | None
    n: int
    k: int
    bias: bool
    function: Activation
    residual: bool
    output: OutputType


def gemms_of(plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[Gemm, ...]:
    """Return the quantized linear layers of a plan, each once, in program order.

    Args:
        plan: The plan.
        tensors: The tensors that it names.
    """
    steps = (step for step in plan.steps if step.op == "fpc.linear")
    found = (_gemm(step, plan.constants, tensors) for step in steps)
    return tuple({gemm.layer: gemm for gemm in found}.values())


def _gemm(step: Step, constants: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Gemm:
    named: dict[str, Any] = dict(zip(LinearArguments._fields, step.args, strict=False))
    given = LinearArguments(**named, **step.kwargs)
    packed = tensors[constants[given.w[0]["v"]]]
    return Gemm(
        layer=given.layer,
        weight=Operand.parse(given.w_operand),
        activation=Operand.parse(given.x_operand) if given.x_operand else None,
        n=packed.shape[0],
        k=given.k,
        bias=given.bias is not None,
        function=Activation(given.activation or "none"),
        residual=given.residual is not None,
        output=_OUTPUTS[given.dtype["dtype"]],
    )
