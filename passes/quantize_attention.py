"""``quantize-attention``: quantize what attention multiplies: queries, keys, values, weights."""

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
from fpcompiler.ir.torch_ops import operator_name
from fpcompiler.ir.types import QuantizedType, tensor_type
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext
from fpcompiler.passes.decompose_attention import FUSED, SAFE_SOFTMAX, decompose_attention

PRODUCTS: Final = ("torch.aten.matmul", "torch.aten.bmm")
"""Products that attention may be written with."""

MOVES: Final = frozenset(
    f"torch.aten.{name}"
    for name in (
        "_to_copy", "_unsafe_view", "alias", "clone", "contiguous", "detach", "expand",
        "flatten.using_ints", "permute", "repeat_interleave.self_int", "reshape", "select.int",
        "slice.Tensor", "squeeze", "squeeze.dim", "to.dtype", "transpose.int", "unflatten.int",
        "unsqueeze", "view",
    )
)  # fmt: skip
"""Operations whose result holds the values of their first operand, arranged in another way."""

CONCATENATE: Final = "torch.aten.cat"
"""``(tensors, axis)``"""

_SOFTMAX: Final = (SAFE_SOFTMAX, "torch.aten.softmax.int", "torch.aten._softmax")
_FLOATS: Final = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Quantize both operands of the products in attention, as LLM-FP4 does for BERT and ViT.

    Queries, keys and values of a fused attention are quantized along the channels of a head, one
    scale for each head and token by default. That is also what a quantized cache of keys and values
    gives, because the scale of a token does not depend on other tokens; what comes from such a
    cache (``quantize-cache``) is not quantized again.

    The weights of attention (after softmax) are inside of the fused operator. To quantize them it
    is replaced by its parts, which costs memory for all scores; so they stay as they are unless
    asked for. A product of two computed matrices is quantized along the axis that it contracts, on
    both sides.

    Attributes:
        operand: Format and scale levels of queries, keys and values; empty: these stay as they are.
        weights: The same for the weights of attention. Empty: they stay in the fused operator, and
            in products that a model writes out they are quantized as ``operand`` says.
    """

    name: ClassVar[str] = "quantize-attention"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    operand: str = "f8E4M3FN@token:f32"
    weights: str = ""

    def __post_init__(self) -> None:
        """Check the operands.

        Raises:
            FormatError: If one means nothing.
            PassError: If both are empty.
        """
        if not self.operand and not self.weights:
            raise PassError(f"{self.name}: nothing to quantize; give operand or weights.")
        for text in filter(None, (self.operand, self.weights)):
            Operand.parse(text)

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite every attention and every product of two computed matrices.

        Raises:
            PassError: If there is none, or one cannot be rewritten.
        """
        operand = Operand.parse(self.operand) if self.operand else None
        weights = Operand.parse(self.weights) if self.weights else None
        evaluator = ConstantEvaluator(program)
        fused = program.operations(FUSED)
        # Listed before fused operators are replaced by products, which are complete as they are.
        products = [op for op in program.operations(*PRODUCTS) if _is_computed(op, evaluator)]
        self._require(fused, products)
        for op in fused:
            _quantize_fused(op, operand, weights, context)
        for op in products:
            _quantize_product(op, operand, weights, context)

    def _require(self, fused: list[ir.Operation], products: list[ir.Operation]) -> None:
        if not fused and not products:
            raise PassError(
                f"{self.name}: the model has no attention and no product of two activations. "
                "Leave the option out."
            )
        if self.weights and not fused and not any(_weighs(op) for op in products):
            raise PassError(
                f"{self.name}: no product has the result of a softmax as its left factor, so there "
                "are no weights of attention. Leave weights= out of the option for attention."
            )


def _quantize_fused(
    op: ir.Operation, operand: Operand | None, weights: Operand | None, context: PassContext
) -> None:
    if operand is not None:
        for index in range(3):
            if not is_cached(op.operands[index]):
                op.operands[index] = _through(op, op.operands[index], operand)
        context.count("attentions quantized")
    if weights is not None:
        decompose_attention(op, lambda value: _through(op, value, weights))
        context.count("attention weights quantized")


def _quantize_product(
    op: ir.Operation, operand: Operand | None, weights: Operand | None, context: PassContext
) -> None:
    weighs = weights is not None and _weighs(op)
    left = weights if weighs else operand
    if left is not None and not is_cached(op.operands[0]):
        op.operands[0] = _through(op, op.operands[0], left)
    if operand is not None and not is_cached(op.operands[1]):
        op.operands[1] = _through_transposed(op, op.operands[1], operand)
    if operand is not None:
        context.count("products quantized")
    if weighs:
        context.count("attention weights quantized")


def _is_computed(op: ir.Operation, evaluator: ConstantEvaluator) -> bool:
    """Whether both operands are floating-point matrices that depend on the input."""
    for value in list(op.operands)[:2]:
        kind, owner = tensor_type(value), value.owner
        if kind is None or kind.element not in _FLOATS or len(kind.shape) < 2:
            return False
        if not isinstance(owner, ir.Block) and evaluator.is_constant(owner.operation):
            return False
    return True


def _source(value: ir.Value) -> ir.Operation | None:
    """Return the operation that computed the values of a tensor; None for an input."""
    while not isinstance(value.owner, ir.Block) and operator_name(value.owner) in MOVES:
        value = value.owner.operands[0]
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def _weighs(op: ir.Operation) -> bool:
    """Whether the left factor of a product is the result of a softmax."""
    source = _source(op.operands[0])
    return source is not None and source.name in _SOFTMAX


def is_cached(value: ir.Value) -> bool:
    """Return whether a tensor holds what quantized caches hold, rearranged at most."""
    source = _source(value)
    if source is None:
        return False
    if source.name == CONCATENATE:
        return all(map(is_cached, source.operands[0].owner.operands))
    if source.name != "fpq.dequantize":
        return False
    return bool(source.operands[0].owner.name == "fpq.assemble")


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
        turned = _through(op, build.transposed(value), operand)
        return build.transposed(turned)
