"""Fused attention as the products, mask and softmax that it consists of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch_mlir import ir
from torch_mlir.extras.fx_importer import TORCH_DTYPE_TO_INT

from fpcompiler.errors import PassError, describe_layer
from fpcompiler.ir import build
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.torch_ops import constant_value
from fpcompiler.ir.types import TensorType, tensor_type

FUSED: Final = "torch.aten.scaled_dot_product_attention"
"""``(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)``."""

SAFE_SOFTMAX: Final = "torch.aten._safe_softmax"
"""The softmax that gives zeros where a mask leaves nothing to attend to."""


def decompose_attention(op: ir.Operation, change: Callable[[ir.Value], ir.Value]) -> None:
    """Replace a fused attention by ``change(softmax(q @ k.T * scale + mask)) @ v``.

    It is what ``torch._scaled_dot_product_attention_math`` computes: in fp32 for half precision,
    heads repeated for grouped queries, zeros for a query that may see no key. The scale stands
    behind the product and not in its factors, so that these stay as they were quantized.

    Args:
        op: An operation :data:`FUSED`.
        change: What happens to the weights of attention [..., queries, keys] before the product
            with the values; called where the insertion point is.

    Raises:
        PassError: If it has dropout, or an option or size is not known at compile time.
    """
    _refuse_dropout(op)
    with ir.InsertionPoint(op), op.location:
        query, key, value = (_computed(operand) for operand in list(op.operands)[:3])
        if _option(op, 7, "enable_gqa"):
            key, value = (_repeated(op, query, operand) for operand in (key, value))
        scores = _product(op, query, build.transposed(key), _kind(key).shape[-2])
        scores = build.aten("mul.Scalar", [scores, _scale(op)], _kind(scores))
        scores = _masked(op, scores)
        axis, dtype = build.constant(-1), build.constant(None)
        weights = build.aten("_safe_softmax", [scores, axis, dtype], _kind(scores))
        attended = _product(op, change(weights), value, _kind(value).shape[-1])
        result = build.cast(attended, _kind(op.results[0]).element)
    op.results[0].replace_all_uses_with(result)
    op.erase()


def _kind(value: ir.Value) -> TensorType:
    kind = tensor_type(value)
    assert kind is not None
    return kind


def _option(op: ir.Operation, index: int, name: str) -> Any:
    """Return the value of an operand that must be a constant."""
    owner = op.operands[index].owner
    if isinstance(owner, ir.Block) or not owner.name.startswith("torch.constant."):
        raise _refusal(op, f"{name} is computed")
    return constant_value(owner.operation)


def _refusal(op: ir.Operation, problem: str) -> PassError:
    return PassError(
        f"{describe_layer(place_of(op).layer)}: the weights of this attention cannot be "
        f"quantized: {problem}. Leave weights= out of the option for attention."
    )


def _refuse_dropout(op: ir.Operation) -> None:
    if _option(op, 4, "dropout_p") != 0:
        raise _refusal(op, "it has dropout (call model.eval())")


def _computed(value: ir.Value) -> ir.Value:
    """Return a factor in the precision that torch computes with."""
    return value if _kind(value).element == "f64" else build.cast(value, "f32")


def _repeated(op: ir.Operation, query: ir.Value, value: ir.Value) -> ir.Value:
    """Return keys or values with each head as often as there are queries for it."""
    kind, heads = _kind(value), _kind(query).shape[-3]
    own = kind.shape[-3]
    if heads is None or own is None:
        raise _refusal(op, "its number of heads is not known")
    if heads == own:
        return value
    shape = (*kind.shape[:-3], heads, *kind.shape[-2:])
    repeats = [build.constant(number) for number in (heads // own, -3, None)]
    return build.aten(
        "repeat_interleave.self_int", [value, *repeats], TensorType(shape, kind.element)
    )


def _product(op: ir.Operation, a: ir.Value, b: ir.Value, columns: int | None) -> ir.Value:
    """Return ``a @ b``; its batch axes are those of the attention's result."""
    shape = (*_kind(op.results[0]).shape[:-1], columns)
    return build.aten("matmul", [a, b], TensorType(shape, _kind(a).element))


def _scale(op: ir.Operation) -> ir.Value:
    if _option(op, 6, "scale") is not None:
        return op.operands[6]
    width = _kind(op.operands[0]).shape[-1]
    if width is None:
        raise _refusal(op, "the width of a head is not known")
    return build.constant(1 / math.sqrt(width))


def _masked(op: ir.Operation, scores: ir.Value) -> ir.Value:
    """Return the scores with -inf where a query may not look, or with the mask added."""
    if _option(op, 5, "is_causal"):
        return _where(_lower_triangle(scores), scores)
    mask = op.operands[3]
    kind = tensor_type(mask)
    if kind is None:
        return scores
    if kind.element == "i1":
        return _where(mask, scores)
    return build.aten("add.Tensor", [scores, mask, build.constant(1)], _kind(scores))


def _where(mask: ir.Value, scores: ir.Value) -> ir.Value:
    operands = [mask, scores, build.constant(-math.inf)]
    return build.aten("where.ScalarOther", operands, _kind(scores))


def _lower_triangle(scores: ir.Value) -> ir.Value:
    """Return [queries, keys], true where the key does not come after the query."""
    kind = TensorType(_kind(scores).shape[-2:], "i1")
    sizes = build.int_list([build.size_of(scores, axis) for axis in (-2, -1)])
    # Made from the scores, and so on the device on which the program runs.
    dtype, *others = TORCH_DTYPE_TO_INT[torch.bool], None, None, None
    options = [build.constant(value) for value in (dtype, *others)]
    ones = build.aten("new_ones", [scores, sizes, *options], kind)
    return build.aten("tril", [ones, build.constant(0)], kind)
