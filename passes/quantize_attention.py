"""``quantize-attention``: quantize what attention multiplies: queries, keys, values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from torch_mlir import ir

from fpcompiler.errors import PassError, describe_layer
from fpcompiler.ir import build
from fpcompiler.ir.dialect import DequantizeOp, QuantizeOp
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.types import QuantizedType, TensorType, tensor_type
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext

_FUSED: Final = "torch.aten.scaled_dot_product_attention"
_PRODUCTS: Final = ("torch.aten.matmul", "torch.aten.bmm")
_FLOATS: Final = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Quantize both operands of the products in attention, as LLM-FP4 does for BERT and ViT.

    Queries, keys and values of a fused attention are quantized along the channels of a head, one
    scale for each head and token by default. That is also what a quantized cache of keys and values
    gives, because the scale of a token does not depend on other tokens. The weights of attention
    (after softmax) are inside of the fused operator and stay as they are. A product of two computed
    matrices is quantized along the axis that it contracts, on both sides.

    Attributes:
        operand: Format and scale levels.
    """

    name: ClassVar[str] = "quantize-attention"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    operand: str = "f8E4M3FN@token:f32"

    def __post_init__(self) -> None:
        """Check the operand.

        Raises:
            FormatError: If it means nothing.
        """
        Operand.parse(self.operand)

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite every attention and every product of two computed matrices.

        Raises:
            PassError: If there is none.
        """
        operand = Operand.parse(self.operand)
        evaluator = ConstantEvaluator(program)
        fused = program.operations(_FUSED)
        products = [op for op in program.operations(*_PRODUCTS) if _is_computed(op, evaluator)]
        if not fused and not products:
            raise PassError(
                f"{self.name}: the model has no attention and no product of two activations. "
                "Leave the option out."
            )
        for op in fused:
            for index in range(3):
                op.operands[index] = _through(op, op.operands[index], operand)
            context.count("attentions quantized")
        for op in products:
            op.operands[0] = _through(op, op.operands[0], operand)
            op.operands[1] = _through_transposed(op, op.operands[1], operand)
            context.count("products quantized")


def _is_computed(op: ir.Operation, evaluator: ConstantEvaluator) -> bool:
    """Whether both operands are floating-point matrices that depend on the input."""
    for value in list(op.operands)[:2]:
        kind, owner = tensor_type(value), value.owner
        if kind is None or kind.element not in _FLOATS or len(kind.shape) < 2:
            return False
        if not isinstance(owner, ir.Block) and evaluator.is_constant(owner.operation):
            return False
    return True


def _through(op: ir.Operation, value: ir.Value, operand: Operand) -> ir.Value:
    """Return the value as quantization leaves it."""
    kind = tensor_type(value)
    assert kind is not None
    if kind.shape[-1] is None and operand.block is not None:
        raise PassError(
            f"{describe_layer(place_of(op).layer)}: a product over an axis of unknown length "
            f"cannot have a scale per block: {operand}. Choose token:f32."
        )
    with ir.InsertionPoint(op), op.location:
        quantized = QuantizeOp(value, QuantizedType(kind.shape, operand).to_mlir()).result
        return DequantizeOp(quantized, kind.to_mlir()).result


def _through_transposed(op: ir.Operation, value: ir.Value, operand: Operand) -> ir.Value:
    """Do the same along the axis before the last, which a right factor contracts."""
    with ir.InsertionPoint(op), op.location:
        turned = _through(op, _transposed(value), operand)
        return _transposed(turned)


def _transposed(value: ir.Value) -> ir.Value:
    kind = tensor_type(value)
    assert kind is not None
    shape = (*kind.shape[:-2], kind.shape[-1], kind.shape[-2])
    axes = [build.constant(-1), build.constant(-2)]
    return build.aten("transpose.int", [value, *axes], TensorType(shape, kind.element))
