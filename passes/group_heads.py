"""``group-heads``: attention of grouped queries reads each key and value once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.torch_ops import constant_value, operator_name
from fpcompiler.ir.types import tensor_type
from fpcompiler.passes.base import Pass, PassContext, has_no_uses, rewrite
from fpcompiler.passes.decompose_attention import FUSED

_GROUPED: Final = 7
"""Which operand of attention says that there are fewer keys than queries (``enable_gqa``)."""

_HEADS: Final = 1
"""The axis of the heads."""

_ATEN: Final = "torch.aten."
_REPEATING: Final = frozenset(
    f"{_ATEN}{name}" for name in ("view", "_unsafe_view", "reshape", "expand", "unsqueeze")
)


@dataclass(frozen=True)
class GroupHeads(Pass):
    """Let attention read the heads of keys and values that several queries share, not copies.

    Models write every head as often as there are queries for it (``repeat_kv``: unsqueeze, expand,
    reshape), which copies the whole cache of a decoder for each token. Attention can be told of
    the groups instead; the result is the same, bit for bit.
    """

    name: ClassVar[str] = "group-heads"
    requires: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite each attention whose keys and values are repeated alike."""

        def pattern(op: ir.Operation) -> Sequence[ir.Value] | None:
            operands = list(op.operands)
            key, value = (_shared(operand) for operand in operands[1:3])
            if key is None or value is None or _scalar(operands[_GROUPED]) is not False:
                return None
            if _sizes(key)[_HEADS] != _sizes(value)[_HEADS]:
                return None
            operands[1:3], operands[_GROUPED] = (key, value), build.constant(True)
            made = ir.Operation.create(op.name, [op.results[0].type], operands)
            context.count("attention with grouped heads")
            return list(made.results)

        if rewrite(program, (FUSED,), pattern):
            _erase_unused(program)


def _shared(value: ir.Value) -> ir.Value | None:
    """Return ``x`` [B, H, N, D] if a value is its heads, repeated: [B, H * G, N, D]."""
    repeated = _argument(value, "view", "_unsafe_view", "reshape")
    expanded = None if repeated is None else _argument(repeated, "expand")
    shared = None if expanded is None else _argument(expanded, "unsqueeze")
    if repeated is None or shared is None or _axis(expanded) != _HEADS + 1:
        return None
    own, wide, joined = (_sizes(item) for item in (shared, repeated, value))
    if (len(own), len(wide), len(joined)) != (4, 5, 4):
        return None
    heads, groups = own[_HEADS], wide[_HEADS + 1]
    if heads is None or groups is None or wide[: _HEADS + 1] + wide[_HEADS + 2 :] != own:
        return None
    # An axis whose size is not known stays what it is if it is the only one.
    whole = [own[0], heads * groups, *own[2:]]
    return shared if joined == whole and joined.count(None) <= 1 else None


def _sizes(value: ir.Value) -> list[int | None]:
    kind = tensor_type(value)
    return [] if kind is None or kind.shape is None else list(kind.shape)


def _argument(value: ir.Value | None, *names: str) -> ir.Value | None:
    """Return the first operand of what computes a value, if that has one of the names."""
    if value is None or isinstance(value.owner, ir.Block):
        return None
    op = value.owner.operation
    return op.operands[0] if operator_name(op).removeprefix(_ATEN) in names else None


def _axis(value: ir.Value | None) -> int | None:
    """Return where an ``unsqueeze`` puts the new one of five axes."""
    axis = None if value is None else _scalar(value.owner.operation.operands[1])
    return axis % 5 if isinstance(axis, int) else None


def _scalar(value: ir.Value) -> Any:
    """Return a scalar constant; None for anything else."""
    if isinstance(value.owner, ir.Block):
        return None
    op = value.owner.operation
    return constant_value(op) if op.name.startswith("torch.constant.") else None


def _erase_unused(program: Program) -> None:
    """Erase what repeated the heads, where nothing else reads it."""
    for op in reversed(program.operations(*_REPEATING)):
        if has_no_uses(op):
            op.erase()
