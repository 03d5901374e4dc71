"""``fpq.linear``, ``fpq.scaled_gemm`` and ``fpq.scaled_gemm_add``: quantized layers.

Beside the dialect itself, whose file would be too long with them; loading the dialect loads them.
"""

# No "from __future__ import annotations": operations are built from the annotations as objects.
# mypy: disable-error-code="call-arg, name-defined, misc"
from typing import Any, Final

from torch_mlir import ir
from torch_mlir.dialects.ext import Operand, Pure, Result

from fpcompiler.ir.dialect import (
    FLOATS,
    Fpq,
    Quantized,
    VerifyError,
    check_operation,
    need_quantized,
    need_same_shape,
    need_tensor,
)
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.ir.types import QuantizedType, quantized_type, shape_text, tensor_type
from fpcompiler.operand import Granularity
from fpcompiler.runtime.fused import ACTIVATIONS

ACTIVATION: Final = "activation"
"""The attribute of ``fpq.scaled_gemm`` that names one of ``fused.ACTIVATIONS``, if there is one.

It is no field of the class because those of a Python-defined operation cannot be optional.
"""

GEMMS: Final = ("fpq.scaled_gemm", "fpq.scaled_gemm_add")
"""Layers for which kernels have been chosen."""


def activation_of(op: ir.Operation) -> str:
    """Return what a layer computes of its result; empty for nothing."""
    return text_of(op.attributes[ACTIVATION]) if ACTIVATION in op.attributes else ""


class LinearOp(Fpq.Operation, name="linear", traits=[Pure]):
    """``fpq.linear``: ``x @ w.T + bias``, the name of the layer as an attribute."""

    input: Operand[Any]
    weight: Operand[Quantized]
    bias: Operand[Any]
    layer: ir.StringAttr
    result: Result[Any]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check the contracted axis, the result and the bias."""
        return check_operation(op, _check_linear)


class ScaledGemmOp(Fpq.Operation, name="scaled_gemm", traits=[Pure]):
    """``fpq.scaled_gemm``: a linear layer with the kernel that runs it, and why that one.

    With the attribute :data:`ACTIVATION` the result is that activation of the layer's output, which
    is rounded to the element type before, as it is in two operations.
    """

    input: Operand[Any]
    weight: Operand[Quantized]
    bias: Operand[Any]
    layer: ir.StringAttr
    kernel: ir.StringAttr
    reason: ir.StringAttr
    result: Result[Any]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check the contracted axis, the result, the bias and the activation."""
        return check_operation(op, _check_gemm)


class ScaledGemmAddOp(Fpq.Operation, name="scaled_gemm_add", traits=[Pure]):
    """``fpq.scaled_gemm_add``: the sum of a residual and of what ``fpq.scaled_gemm`` gives.

    That is rounded to the element type before. It is an operation of its own because an operand
    that may be missing would change the text of all others.
    """

    input: Operand[Any]
    weight: Operand[Quantized]
    bias: Operand[Any]
    residual: Operand[Any]
    layer: ir.StringAttr
    kernel: ir.StringAttr
    reason: ir.StringAttr
    result: Result[Any]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check the contracted axis, the result, the bias, the activation and the residual."""
        return check_operation(op, _check_gemm_add)


def _check_linear(op: ir.Operation) -> None:
    weight = need_quantized(op.operands[1], "weight")
    x = quantized_type(op.operands[0]) or need_tensor(op.operands[0], "input")
    result = need_tensor(op.results[0], "result")
    if len(weight.shape) != 2 or None in weight.shape:
        raise VerifyError(f"weight must be [N, K] with known sizes, not {shape_text(weight.shape)}")
    if not x.shape or x.shape[-1] != weight.shape[1]:
        raise VerifyError(
            f"the contracted axes differ: input {shape_text(x.shape)}, "
            f"weight {shape_text(weight.shape)}"
        )
    need_same_shape(result.shape, (*x.shape[:-1], weight.shape[0]), "result")
    bias = tensor_type(op.operands[2])
    if bias is not None:
        need_same_shape(bias.shape, (weight.shape[0],), "bias")
    if isinstance(x, QuantizedType):
        _check_granularities(x, weight)


def _check_granularities(x: QuantizedType, weight: QuantizedType) -> None:
    for kind, wrong, what in ((x, Granularity.ROW, "input"), (weight, Granularity.TOKEN, "weight")):
        for level in kind.operand.levels:
            if level.granularity is wrong:
                raise VerifyError(f"{what} cannot have a scale per {wrong.value}: {kind.operand}")


def _check_gemm(op: ir.Operation) -> None:
    _check_linear(op)
    result = need_tensor(op.results[0], "result")
    if ACTIVATION not in op.attributes:
        return
    name = op.attributes[ACTIVATION]
    if not isinstance(name, ir.StringAttr) or name.value not in ACTIVATIONS:
        raise VerifyError(f"there is no activation {name}; there are {', '.join(ACTIVATIONS)}")
    if result.element not in FLOATS:
        raise VerifyError(f"an activation is computed of {', '.join(FLOATS)}, not {result.element}")


def _check_gemm_add(op: ir.Operation) -> None:
    _check_gemm(op)
    residual, result = need_tensor(op.operands[3], "residual"), need_tensor(op.results[0], "result")
    need_same_shape(residual.shape, result.shape, "residual")
    if residual.element != result.element or result.element not in FLOATS:
        raise VerifyError(
            f"a residual of {residual.element} cannot be added to {result.element}; both must be "
            f"one of {', '.join(FLOATS)}"
        )
