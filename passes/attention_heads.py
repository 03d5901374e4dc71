"""Through attention: the channels of its output are those of its values, head by head.

The weights of attention mix tokens and leave channels alone, so what multiplies a channel of the
output may multiply it in the values before.
"""

from __future__ import annotations

from typing import Final

from torch_mlir import ir

from fpcompiler.ir.torch_ops import constant_value, operator_name
from fpcompiler.ir.types import tensor_type

_ATTENTION: Final = "torch.aten.scaled_dot_product_attention"
_VIEWS: Final = frozenset(
    {
        "torch.aten.view", "torch.aten._unsafe_view", "torch.aten.reshape",
        "torch.aten.flatten.using_ints", "torch.aten.unflatten.int",
    }
)  # fmt: skip
_COPIES: Final = frozenset({"torch.aten.contiguous", "torch.aten.clone"})
_TOKENS_AND_HEADS: Final = ((1, 2), (2, 1), (-2, -3), (-3, -2), (1, -2), (-2, 1), (2, -3), (-3, 2))


def values_before_heads(merged: ir.Operation) -> ir.Value | None:
    """Return the values ``[..., H * D]`` of the attention whose heads an operation merges.

    Args:
        merged: What may make ``[..., H * D]`` of the output of attention.

    Returns:
        None if there is no attention before it, if heads share values (grouped queries), or if
        something else reads what lies between.
    """
    heads = _split_shape(merged, merged.operands[0])
    output = _only_reader(_swapped(merged.operands[0]), _ATTENTION)
    if heads is None or output is None:
        return None
    values = _swapped(output.operands[2])
    split = None if values is None or not _has_one_reader(values) else _owner(values)
    if split is None or operator_name(split) not in _VIEWS:
        return None
    source = split.operands[0]
    same = _split_shape(split, values) == heads and _channels(source) == heads[0] * heads[1]
    return source if same and _has_one_reader(output.operands[2]) else None


def _split_shape(view: ir.Operation, value: ir.Value | None) -> tuple[int, int] | None:
    """Return H and D if a view goes between ``[..., H, D]``, the given value, and ``[..., HD]``."""
    kind = None if value is None else tensor_type(value)
    if operator_name(view) not in _VIEWS or kind is None or len(kind.shape) != 4:
        return None
    heads, channels = kind.shape[-2:]
    merged = {_channels(view.operands[0]), _channels(view.results[0])} - {channels}
    if heads is None or channels is None or merged not in ({heads * channels}, set()):
        return None
    return heads, channels


def _swapped(value: ir.Value) -> ir.Value | None:
    """Return the value of which this one is a transpose of tokens and heads, copied or not."""
    op = _owner(value)
    while op is not None and operator_name(op) in _COPIES and _has_one_reader(op.operands[0]):
        op = _owner(op.operands[0])
    if op is None or operator_name(op) != "torch.aten.transpose.int":
        return None
    axes = [_owner(axis) for axis in list(op.operands)[1:3]]
    if any(axis is None or axis.name != "torch.constant.int" for axis in axes):
        return None
    pair = tuple(constant_value(axis) for axis in axes if axis is not None)
    return op.operands[0] if pair in _TOKENS_AND_HEADS else None


def _only_reader(value: ir.Value | None, name: str) -> ir.Operation | None:
    """Return the operation of a name that makes a value which has one reader."""
    op = None if value is None or not _has_one_reader(value) else _owner(value)
    return op if op is not None and operator_name(op) == name else None


def _owner(value: ir.Value) -> ir.Operation | None:
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def _has_one_reader(value: ir.Value) -> bool:
    return len(list(value.uses)) == 1


def _channels(value: ir.Value) -> int | None:
    kind = tensor_type(value)
    return kind.shape[-1] if kind is not None and kind.shape else None
