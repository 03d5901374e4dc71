"""What may be written to a quantized cache: operations that move whole rows of channels.

A row of a cache [..., tokens, channels] has its own codes and scales. An operation that only moves
rows does to the codes and to the scales what it did to the values, so it is done to each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cmp_to_key
from types import MappingProxyType
from typing import Final

from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.dialect import DisassembleOp, QuantizeOp, part_texts
from fpcompiler.ir.stored import Parts
from fpcompiler.ir.torch_ops import constant_value, operator_name
from fpcompiler.ir.types import QuantizedType, TensorType, tensor_type


class UnknownWriteError(Exception):
    """A write that does more than move rows; the message says which one."""


@dataclass(frozen=True)
class _RowMove:
    """How an operation moves rows.

    ``rows``: positions of the operands that hold them; of a list, its items do. ``axis``: position
    of the operand that names the axis along which it works. ``indices``: position of a list with
    one index for each axis.
    """

    rows: tuple[int, ...]
    axis: int | None = None
    indices: int | None = None


_MOVES: Final = MappingProxyType(
    {
        "torch.aten.index_copy": _RowMove((0, 3), axis=1),
        "torch.aten.index_put": _RowMove((0, 2), indices=1),
        "torch.aten.index_put.hacked_twin": _RowMove((0, 2), indices=1),
        "torch.aten.slice_scatter": _RowMove((0, 1), axis=2),
        "torch.aten.select_scatter": _RowMove((0, 1), axis=2),
        "torch.aten.slice.Tensor": _RowMove((0,), axis=1),
        "torch.aten.select.int": _RowMove((0,), axis=1),
        "torch.aten.cat": _RowMove((0,), axis=1),
        "torch.aten.copy": _RowMove((1,)),
    }
)


_ABSENT: Final = "!torch.none"


@dataclass(frozen=True)
class Writes:
    """How the contents of a cache at the end of a call come from those at its start.

    Attributes:
        loads: The contents at the start.
        moves: The operations in between, in program order; each moves rows.
        rows: What they bring into the cache: values of whole rows, computed by the program.
    """

    loads: tuple[ir.Value, ...]
    moves: tuple[ir.Operation, ...]
    rows: tuple[ir.Value, ...]

    @property
    def contents(self) -> list[ir.Value]:
        """Every value that holds rows of the cache."""
        return [*self.loads, *(op.results[0] for op in self.moves)]


def trace_writes(loads: Sequence[ir.Value], stored: ir.Value) -> Writes:
    """Follow what is stored in a cache back to what was loaded from it.

    Args:
        loads: Values of the cache [..., tokens, channels].
        stored: What it is at the end.

    Raises:
        UnknownWriteError: If anything on the way does more than move rows.
    """
    dependent, pending = _dependents(loads, stored), [stored]
    moves: list[ir.Operation] = []
    rows: list[ir.Value] = []
    seen = set(loads)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        op = value.owner
        if isinstance(op, ir.Block) or op.operation not in dependent:
            _check_row(value, loads[0])
            rows.append(value)
            continue
        pending += _moved_rows(op.operation, loads[0])
        moves.append(op.operation)
    moves.sort(key=cmp_to_key(_order))
    return Writes(tuple(loads), tuple(moves), tuple(rows))


def _order(a: ir.Operation, b: ir.Operation) -> int:
    return -1 if a.is_before_in_block(b) else 1


def _dependents(values: Iterable[ir.Value], last: ir.Value) -> set[ir.Operation]:
    """Return the operations up to the one of ``last`` that some values have an influence on."""
    found: set[ir.Operation] = set()
    if isinstance(last.owner, ir.Block):
        return found
    end, pending = last.owner.operation, list(values)
    while pending:
        users = {use.owner.operation for use in pending.pop().uses} - found
        # What comes later is most of the program.
        near = {op for op in users if op == end or op.is_before_in_block(end)}
        found |= near
        pending += [result for op in near for result in op.results]
    return found


def _check_row(value: ir.Value, cache: ir.Value) -> None:
    kind, wanted = _kind(value), _kind(cache)
    if not kind.shape or kind.shape[-1] != wanted.shape[-1] or kind.element != wanted.element:
        raise UnknownWriteError(f"{kind} is written to it, which is not rows of {wanted}")


def _moved_rows(op: ir.Operation, cache: ir.Value) -> list[ir.Value]:
    """Return the operands of an operation that hold rows."""
    name = operator_name(op).removeprefix("torch.aten.")
    move = _MOVES.get(operator_name(op))
    if move is None:
        raise UnknownWriteError(f"what is stored comes from its contents through {name}")
    rows = [item for index in move.rows for item in _items(op.operands[index])]
    rank = len(_kind(rows[0]).shape)
    if move.axis is not None and _axis(op.operands[move.axis]) in (None, -1, rank - 1):
        raise UnknownWriteError(f"{name} works along its channels")
    if move.indices is not None and not _leaves_channels(op, move.indices, rank):
        raise UnknownWriteError(f"{name} adds to it, or chooses single channels")
    if name == "copy" and _kind(rows[0]).shape != _kind(op.results[0]).shape:
        raise UnknownWriteError("copy repeats what it writes")
    return rows


def _items(value: ir.Value) -> list[ir.Value]:
    """Return the items of a list, or the value itself."""
    if tensor_type(value) is not None:
        return [value]
    if isinstance(value.owner, ir.Block) or value.owner.name != "torch.prim.ListConstruct":
        raise UnknownWriteError("it is written with a list of a length that is not known")
    return list(value.owner.operands)


def _axis(value: ir.Value) -> int | None:
    """Return the axis that a constant names, or None if it is computed."""
    if isinstance(value.owner, ir.Block) or not value.owner.name.startswith("torch.constant."):
        return None
    return int(constant_value(value.owner.operation))


def _leaves_channels(op: ir.Operation, position: int, rank: int) -> bool:
    """Whether an assignment by index replaces whole rows."""
    accumulate = op.operands[3].owner
    if accumulate.name != "torch.constant.bool" or constant_value(accumulate.operation):
        return False
    indices = _items(op.operands[position])
    while indices and str(indices[-1].type) == _ABSENT:
        indices.pop()
    return sum(map(_indexed_axes, indices)) < rank


def _indexed_axes(index: ir.Value) -> int:
    """Return over how many axes an index chooses: a mask has one axis for each of them."""
    if str(index.type) == _ABSENT:
        return 1
    kind = _kind(index)
    return len(kind.shape) if kind.element == "i1" else 1


def move_parts(
    writes: Writes, kind: QuantizedType, load: Callable[[], Parts]
) -> dict[ir.Value, Parts]:
    """Create the operations that do all writes to codes and scales.

    Args:
        writes: What to do.
        kind: The cache.
        load: Loads the parts of the cache, at the insertion point.

    Returns:
        The parts of each of the contents and rows.
    """
    parts: dict[ir.Value, Parts] = {}
    for value in writes.loads:
        # Before it, so that what is put behind the value can read them.
        with ir.InsertionPoint(value.owner.operation), value.owner.location:
            parts[value] = load()
    for value in writes.rows:
        parts[value] = _quantized(value, kind)
    for op in writes.moves:
        with ir.InsertionPoint(op), op.location:
            parts[op.results[0]] = tuple(_moved(op, parts, slot) for slot in range(3))
    return parts


def _quantized(value: ir.Value, kind: QuantizedType) -> Parts:
    """Quantize rows as soon as they are known."""
    rows = QuantizedType(_kind(value).shape, kind.operand)
    texts = part_texts(rows)
    with after(value):
        quantized = QuantizeOp(value, rows.to_mlir()).result
        op = DisassembleOp(quantized, *map(ir.Type.parse, texts))
    results = op.operation.results
    return tuple(None if t == _ABSENT else r for t, r in zip(texts, results, strict=True))


@contextmanager
def after(value: ir.Value) -> Iterator[None]:
    """Insert behind the operation that computes a value, with its location."""
    if isinstance(value.owner, ir.Block):
        with ir.InsertionPoint.at_block_begin(value.owner), ir.Location.unknown():
            yield
        return
    with ir.InsertionPoint.after(value.owner.operation), value.owner.location:
        yield


def _moved(op: ir.Operation, parts: Mapping[ir.Value, Parts], slot: int) -> ir.Value | None:
    """Do what an operation does to rows of the cache to one of their parts."""
    name, operands = operator_name(op), list(op.operands)
    items: list[ir.Value | None] = []
    for index in _MOVES[name].rows:
        items = [parts[item][slot] for item in _items(operands[index])]
        if any(item is None for item in items):
            return None  # The cache has no scale of this level.
        operands[index] = items[0] if tensor_type(operands[index]) else _tensor_list(items)
    if name == "torch.aten.copy":
        return items[0]
    part = _kind(items[0])
    result = TensorType((*_kind(op.results[0]).shape[:-1], part.shape[-1]), part.element)
    return build.aten(name.removeprefix("torch.aten."), operands, result)


def _tensor_list(items: Sequence[ir.Value | None]) -> ir.Value:
    kind = ir.Type.parse("!torch.list<vtensor>")
    return ir.Operation.create("torch.prim.ListConstruct", results=[kind], operands=items).result


def _kind(value: ir.Value | None) -> TensorType:
    kind = None if value is None else tensor_type(value)
    assert kind is not None
    return kind
