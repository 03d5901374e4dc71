"""``quantize-cache``: keep the keys and values of earlier calls in few bits."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from torch_mlir import ir

from fpcompiler.errors import PassError
from fpcompiler.ir import build
from fpcompiler.ir.dialect import DequantizeOp
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.stored import Parts, QuantizedState, assemble
from fpcompiler.ir.torch_ops import operator_name, text_of
from fpcompiler.ir.types import QuantizedType, tensor_type
from fpcompiler.numerics import quantize_packed
from fpcompiler.operand import Granularity, Operand
from fpcompiler.passes.base import Pass, PassContext
from fpcompiler.passes.cache_rows import (
    UnknownWriteError,
    Writes,
    after,
    move_parts,
    trace_writes,
)
from fpcompiler.passes.decompose_attention import FUSED
from fpcompiler.passes.quantize_attention import CONCATENATE, MOVES, PRODUCTS

STORED: Final = "fpq.cache"
"""Attribute of the global with the codes of a cache: the type of the cache."""

BEFORE: Final = "fpq.bytes_before"
AFTER: Final = "fpq.bytes_after"
"""Attributes of the same global: bytes of the cache as captured, and of its codes and scales."""

KEPT: Final = "fpq.kept"
"""Attribute of the global of a buffer that stays as it is: why."""


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Store caches of keys and values as packed codes with a scale per head and token.

    A cache is a buffer [..., tokens, channels] that the model writes and attention reads. New rows
    are quantized once, when they are written; all of it is dequantized where it is read. A token
    gets the codes that it would get in front of a fused attention, so the result is the one of
    ``quantize-attention`` on keys and values, bit for bit, and memory is saved. That pass comes
    later, and does not quantize again what comes from a cache.

    A buffer that is written in a way that is not understood stays as it is, with a warning, and the
    reason in its row of the plan.

    Attributes:
        operand: Format and scale levels; no level may be shared by tokens.
    """

    name: ClassVar[str] = "quantize-cache"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    operand: str = "f8E4M3FN@token:f32"

    def __post_init__(self) -> None:
        """Check the operand.

        Raises:
            FormatError: If it means nothing.
            PassError: If tokens would share a scale.
        """
        for level in Operand.parse(self.operand).levels:
            if level.granularity not in (Granularity.TOKEN, Granularity.BLOCK):
                raise PassError(
                    f"{self.name}: {self.operand} has a scale per {level.granularity.value}, which "
                    "a new token would change for all. Choose token:f32 or blocks."
                )

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite every cache.

        Raises:
            PassError: If there is none that can be stored in few bits.
        """
        operand = Operand.parse(self.operand)
        refused: dict[str, str] = {}
        uses = _uses(program)
        for name in _buffers(program):
            try:
                access = _Access.of(uses[name])
            except UnknownWriteError as reason:
                refused[name] = str(reason)
                _globals(program)[name].attributes[KEPT] = ir.StringAttr.get(str(reason))
                continue
            before, now = _quantize(program, name, access, operand)
            context.count(_DONE)
            context.count("cache bytes before", before)
            context.count("cache bytes after", now)
        if not context.statistics[_DONE]:
            raise PassError(
                f"{self.name}: {_describe(refused)} Leave cache= out of the option for attention."
            )
        if refused:
            context.count("caches kept", len(refused))
            warnings.warn(f"{self.name}: {_describe(refused)}", stacklevel=2)


_DONE: Final = "caches quantized"


def _describe(refused: Mapping[str, str]) -> str:
    if not refused:
        return "the model has no buffer of keys and values that a call writes and attention reads."
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return f"these buffers stay in high precision: {reasons}."


def _globals(program: Program) -> dict[str, ir.Operation]:
    """Return the declared globals by name."""
    declared = (op.operation for op in program.module.body.operations)
    return {
        text_of(op.attributes["sym_name"]): op for op in declared if op.name == "ml_program.global"
    }


def _buffers(program: Program) -> list[str]:
    """Return the globals that a call writes and that have a token and a channel axis."""
    mutable = (name for name, op in _globals(program).items() if "is_mutable" in op.attributes)
    tensors = {name: program.weights[name] for name in mutable}
    return [name for name, t in tensors.items() if t.is_floating_point() and t.ndim >= 2]


_LOAD: Final = "ml_program.global_load"
_STORE: Final = "ml_program.global_store"


def _uses(program: Program) -> defaultdict[str, list[ir.Operation]]:
    """Return the loads and stores of each global."""
    uses: defaultdict[str, list[ir.Operation]] = defaultdict(list)
    for op in program.operations(_LOAD, _STORE):
        uses[build.symbol_name(op)].append(op)
    return uses


@dataclass(frozen=True)
class _Access:
    """The operations that read and write a buffer."""

    loads: tuple[ir.Operation, ...]
    store: ir.Operation
    writes: Writes

    @classmethod
    def of(cls, uses: Sequence[ir.Operation]) -> _Access:
        """Return them as what they are.

        Raises:
            UnknownWriteError: If the buffer cannot be stored as codes and scales.
        """
        loads = tuple(op for op in uses if op.name == _LOAD)
        stores = [op for op in uses if op.name == _STORE]
        values = [use.owner.operation.results[0] for op in loads for use in op.results[0].uses]
        if len(stores) != 1 or not values:
            raise UnknownWriteError("it is not read and written once in a call")
        writes = trace_writes(values, stores[0].operands[0].owner.operands[0])
        if not any(map(_is_attended, writes.contents)):
            raise UnknownWriteError("no attention reads it as it is")
        return cls(loads, stores[0], writes)


def _is_attended(value: ir.Value) -> bool:
    """Whether a product of attention reads a value, rearranged at most."""
    users = [use.owner.operation for use in value.uses]
    if any(op.name in (FUSED, *PRODUCTS) for op in users):
        return True
    moved = (*MOVES, CONCATENATE, "torch.prim.ListConstruct")
    return any(_is_attended(op.results[0]) for op in users if operator_name(op) in moved)


def _quantize(program: Program, name: str, access: _Access, operand: Operand) -> tuple[int, int]:
    """Rewrite one cache; return its bytes before and after."""
    initial, writes = program.weights[name], access.writes
    kind = QuantizedType(tuple(initial.shape), operand)
    packed, scales = quantize_packed(initial, operand, layer=name)
    state = QuantizedState.declare(program, name, kind, packed, scales)
    parts = move_parts(writes, kind, state.load)
    stored = access.store.operands[0].owner.operation
    with ir.InsertionPoint(access.store):
        state.store(parts[stored.operands[0]])
    for op in (access.store, stored):
        op.erase()
    _replace_reads(writes, parts, operand)
    loaded = [value.owner.operation for value in writes.loads]
    for op in (*reversed(writes.moves), *loaded, *access.loads):
        op.erase()
    _describe_state(program, state, initial.nbytes)
    return initial.nbytes, state.nbytes


def _replace_reads(writes: Writes, parts: Mapping[ir.Value, Parts], operand: Operand) -> None:
    """Let everything but the writes read what codes and scales stand for."""
    for value in writes.contents:
        reads = [use for use in value.uses if use.owner.operation not in writes.moves]
        if not reads:
            continue
        kind = tensor_type(value)
        assert kind is not None
        with after(value):
            whole = QuantizedType(kind.shape, operand)
            read = DequantizeOp(assemble(parts[value], whole), kind.to_mlir()).result
        for use in reads:
            use.owner.operands[use.operand_number] = read


def _describe_state(program: Program, state: QuantizedState, before: int) -> None:
    """Leave what the plan says about a cache with the global of its codes."""
    assert state.names[0] is not None
    attributes = _globals(program)[state.names[0]].attributes
    count = ir.IntegerType.get_signless(64)
    attributes[STORED] = ir.TypeAttr.get(state.kind.to_mlir())
    attributes[BEFORE] = ir.IntegerAttr.get(count, before)
    attributes[AFTER] = ir.IntegerAttr.get(count, state.nbytes)
