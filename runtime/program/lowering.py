"""From steps to operations of the native library, for values whose places are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch

from fpcompiler.native.program import RANK, Kind
from fpcompiler.plan import Step
from fpcompiler.runtime.native import NativeLinear
from fpcompiler.runtime.native_producers import Form, ProducedForm, form_of_rows
from fpcompiler.runtime.native_steps import NativeLayer, NativeQuantizer
from fpcompiler.runtime.operators import Function, Ref
from fpcompiler.runtime.ops import LinearArguments
from fpcompiler.runtime.program.attention import NativeAttention, attention_call
from fpcompiler.runtime.program.record import Known, Place, Plain, Ready, Several, places_of
from fpcompiler.runtime.program.views import (
    TYPES,
    broadcast,
    contiguous_strides,
    is_contiguous,
    joined,
)
from fpcompiler.runtime.state import write_rows

_OUTER: Final = 1
_BLOCKS: Final = 2
"""``FpcOperation.flag`` of codes that are prepared: which scales there are."""

_RESIDUAL: Final = 1
"""``FpcOperation.flag`` of a product whose second view is added to its results."""

_COMPUTED: Final = (torch.float32, torch.bfloat16)
"""What arithmetic is done on."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """An operation of the native library.

    Attributes:
        kind: What it does.
        y: What it writes.
        x: What it reads.
        scalar, flag, integers: See ``FpcOperation``.
        linear: The layer that activations are prepared for, or that multiplies them.
        produced: How they are computed before, if they are.
    """

    kind: Kind
    y: Place | Ready
    x: tuple[Place | Ready, ...]
    scalar: float = 0.0
    flag: int = 0
    integers: tuple[int, int] = (0, 0)
    linear: NativeLinear | None = None
    produced: Produced | None = None


@dataclass(frozen=True, slots=True)
class Produced:
    """How activations are computed from ``x[0]``; ``x[1:]`` is the scale and the shift, if given.

    Attributes:
        name, eps: The producer.
        form: Where rows are.
        vectors: Weight and bias of a norm.
    """

    name: str
    eps: float
    form: ProducedForm
    vectors: tuple[Place | None, Place | None]


@dataclass(frozen=True)
class Bound:
    """A step with what is known of its arguments and results.

    Attributes:
        step: The step.
        function: What runs it.
        args: Its arguments; values are replaced by what is known of them.
        kwargs: Arguments by name, likewise.
        outs: What is known of its results.
        scratch: Returns a new buffer of some bytes, for what the operations of the step share.
    """

    step: Step
    function: Function
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outs: tuple[Known, ...]
    scratch: Callable[[int], int]


Lowering: TypeAlias = Callable[[Bound], list[Lowered] | None]


def bound(
    step: Step,
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: Mapping[str, Known],
    scratch: Callable[[int], int],
) -> Bound:
    """Return a step with its values replaced by what is known of them."""
    outs = tuple(known[name] for name in step.outs)
    filled = {name: _fill(value, known) for name, value in kwargs.items()}
    return Bound(step, function, [_fill(arg, known) for arg in args], filled, outs, scratch)


def lower(bound: Bound) -> list[Lowered] | None:
    """Return the operations of a step: none if it makes a view; None if torch has to run it."""
    custom = _FUNCTIONS.get(type(bound.function))
    if custom is not None:
        return custom(bound)
    if bound.function is write_rows:
        return _write_rows(bound)
    if _is_free(bound):
        return []
    found = _OPERATORS.get(bound.step.op)
    return None if found is None else found(bound)


def _fill(argument: Any, known: Mapping[str, Known]) -> Any:
    if isinstance(argument, Ref):
        value = known[argument.name]
        return value.value if isinstance(value, Plain) else value
    if isinstance(argument, list):
        return [_fill(item, known) for item in argument]
    return argument


def _places(arguments: Any) -> list[Place]:
    if isinstance(arguments, Place | Several):
        return list(places_of(arguments))
    if isinstance(arguments, list):
        return [place for item in arguments for place in _places(item)]
    return []


def _is_free(bound: Bound) -> bool:
    """Whether all results are numbers that come from numbers and sizes, or views of arguments."""
    read = {place.buffer for place in _places([*bound.args, *bound.kwargs.values()])}
    if all(isinstance(out, Plain) for out in bound.outs):
        return bound.step.op.startswith(("py.", "aten.sym_")) or not read
    made = [place for out in bound.outs for place in places_of(out)]
    return bool(made) and all(place.buffer in read for place in made)


# --- layers -----------------------------------------------------------------------------------


def _layer(bound: Bound) -> list[Lowered] | None:
    function, (out,), x = bound.function, bound.outs, bound.args[0]
    if not isinstance(function, NativeLayer) or not isinstance(out, Place):
        return None
    if not is_contiguous(out) or out.dtype not in TYPES:
        return None
    linear, before = function.linear, []
    ready = x[0]
    if not isinstance(ready, Ready):
        prepared = _prepared(bound, linear, x, out.dtype)
        if prepared is None:
            return None
        before, ready = [prepared], prepared.y
        assert isinstance(ready, Ready)
    sizes = (ready.rows, linear.outputs)
    rows = _rows(out, *sizes)
    reads: tuple[Place | Ready, ...] = (ready,)
    flag = 0
    residual = LinearArguments(*bound.args).residual
    if residual is not None:
        copied = _without_gaps(bound, residual)
        if copied is None or (residual.sizes, residual.dtype) != (out.sizes, out.dtype):
            return None
        before, reads, flag = [*before, *copied[0]], (ready, _rows(copied[1], *sizes)), _RESIDUAL
    return [*before, Lowered(Kind.MULTIPLY, rows, reads, flag=flag, integers=sizes, linear=linear)]


def _without_gaps(bound: Bound, place: Place) -> tuple[list[Lowered], Place] | None:
    """Return values that lie in order, and what copies them there if they do not."""
    if is_contiguous(place):
        return [], place
    buffer = bound.scratch(prod(place.sizes) * place.dtype.itemsize)
    whole = Place(buffer, 0, place.sizes, contiguous_strides(place.sizes), place.dtype)
    copy = _copied(whole, place)
    return None if copy is None else (copy, whole)


def _prepared(
    bound: Bound, linear: NativeLinear, x: Sequence[Any], dtype: torch.dtype
) -> Lowered | None:
    """Return what makes the input of a layer ready: values, or codes with their scales."""
    operand, k = linear.kind.operand, linear.kind.k
    if not all(is_contiguous(part) and part.dtype in TYPES for part in x):
        return None
    rows = prod(x[0].sizes) // k
    if operand is None and x[0].dtype != dtype:
        return None
    ready = Ready(bound.scratch(linear.prepared_bytes(rows)), rows)
    if operand is None:
        values = _rows(x[0], rows, k)
        return Lowered(Kind.PREPARE, ready, (values,), integers=(rows, k), linear=linear)
    outer, block = operand.outer is not None, operand.block is not None
    scales = [_rows(scale, 1, prod(scale.sizes)) for scale in x[1:]]
    if outer + block != len(scales):
        return None
    # The library has a place for each kind of scales, whether they are there or not.
    views = (_rows(x[0], rows, k), scales[0] if outer else _rows(x[0], 1, 1), *scales[outer:])
    flag = _OUTER * outer + _BLOCKS * block
    return Lowered(Kind.PREPARE_CODES, ready, views, flag=flag, integers=(rows, k), linear=linear)


def _quantizer(bound: Bound) -> list[Lowered] | None:
    function, out, x = bound.function, bound.outs[0], bound.args[0]
    if not isinstance(function, NativeQuantizer) or not isinstance(out, Ready):
        return None
    if bound.step.op == "fpc.fused_quantize":
        return _produced(bound, function, out)
    if bound.step.op != "fpc.quantize" or not is_contiguous(x) or x.dtype not in TYPES:
        return None
    sizes = (out.rows, function.linear.kind.k)
    rows = _rows(x, *sizes)
    return [Lowered(Kind.PREPARE, out, (rows,), integers=sizes, linear=function.linear)]


def _produced(bound: Bound, function: NativeQuantizer, out: Ready) -> list[Lowered] | None:
    x, weight, bias, scale, shift, name, eps = bound.args[:7]
    form = form_of_rows(name, *map(_form, (x, weight, bias, scale, shift)))
    if form is None or form.stride is None:
        return None
    sizes = (out.rows, form.stride)
    views = (_rows(x, 1, x.sizes[-1]), *(_rows(v, 1, 1) for v in (scale, shift) if v is not None))
    how = Produced(name, eps, form, (weight, bias))
    linear = function.linear
    return [Lowered(Kind.PRODUCE, out, views, integers=sizes, linear=linear, produced=how)]


def _form(place: Place | None) -> Form | None:
    return None if place is None else Form(place.sizes, place.strides, place.dtype)


def _rows(place: Place, count: int, length: int) -> Place:
    """Return values that lie in order as rows."""
    return Place(place.buffer, place.offset, (count, length), (length, 1), place.dtype)


def _attention(bound: Bound) -> list[Lowered] | None:
    (out,) = bound.outs
    call = attention_call(*bound.args, **bound.kwargs)
    if call is None or not isinstance(out, Place):
        return None
    return [Lowered(Kind.ATTENTION, out, call.views, call.scale, call.flag)]


def _write_rows(bound: Bound) -> list[Lowered] | None:
    y, axis, index, x = bound.args
    if y.dtype != x.dtype or index.dtype != torch.int64 or max(len(y.sizes), 1) > RANK:
        return None
    axis = axis % len(y.sizes) + RANK - len(y.sizes)
    return [Lowered(Kind.INDEX_COPY, y, (x, index), integers=(axis, 0))]


_FUNCTIONS: Final[Mapping[type, Lowering]] = MappingProxyType(
    {NativeLayer: _layer, NativeQuantizer: _quantizer, NativeAttention: _attention}
)

# --- single operations ------------------------------------------------------------------------


def _elementwise(kind: Kind, y: Place, *x: Place, scalar: float = 0.0) -> list[Lowered] | None:
    """Return one operation on views that have few axes: those that lie as one are joined."""
    views = joined(y, *(broadcast(view, y.sizes) for view in x))
    if len(views[0].sizes) > RANK or any(view.dtype not in TYPES for view in views):
        return None
    return [Lowered(kind, views[0], views[1:], scalar)]


def _copied(y: Place, x: Place) -> list[Lowered] | None:
    same = y.dtype == x.dtype
    if not same and not {y.dtype, x.dtype} <= {*_COMPUTED}:
        return None
    return _elementwise(Kind.COPY, y, x)


def _copy(bound: Bound) -> list[Lowered] | None:
    """A copy; where it has other sizes, values in the order of the axes stay in it."""
    (y,), x = bound.outs, bound.args[0]
    assert isinstance(y, Place)
    if y.sizes != x.sizes:
        if not is_contiguous(y):
            return None
        y = Place(y.buffer, y.offset, x.sizes, contiguous_strides(x.sizes), y.dtype)
    return _copied(y, x)


def _cat(bound: Bound) -> list[Lowered] | None:
    (y,), parts = bound.outs, bound.args[0]
    assert isinstance(y, Place)
    axis = (bound.args[1] if len(bound.args) > 1 else 0) % len(y.sizes)
    found: list[Lowered] = []
    at, size = y.offset, y.dtype.itemsize
    for part in parts:
        if len(part.sizes) != len(y.sizes):
            return None  # torch allows empty tensors of one axis
        own = Place(y.buffer, at, part.sizes, y.strides, y.dtype)
        copy = _copied(own, part) if prod(part.sizes) else []
        if copy is None:
            return None
        found += copy
        at += part.sizes[axis] * y.strides[axis] * size
    return found


def _binary(kind: Kind) -> Lowering:
    def lower(bound: Bound) -> list[Lowered] | None:
        (y,), arguments = bound.outs, bound.args[:2]
        assert isinstance(y, Place)
        plain = bound.kwargs.get("alpha", 1) == 1 and len(bound.args) == 2
        fits = all(isinstance(a, Place) and a.dtype == y.dtype for a in arguments)
        if not plain or not fits or y.dtype not in _COMPUTED:
            return None
        return _elementwise(kind, y, *arguments)

    return lower


def _scale(bound: Bound) -> list[Lowered] | None:
    (y,), (x, factor) = bound.outs, bound.args[:2]
    assert isinstance(y, Place)
    if y.dtype != x.dtype or y.dtype not in _COMPUTED or not isinstance(factor, int | float):
        return None
    return _elementwise(Kind.SCALE, y, x, scalar=float(factor))


def _negate(bound: Bound) -> list[Lowered] | None:
    (y,), x = bound.outs, bound.args[0]
    assert isinstance(y, Place)
    return _elementwise(Kind.NEG, y, x) if y.dtype in _COMPUTED else None


def _embedding(bound: Bound) -> list[Lowered] | None:
    (y,), (table, index) = bound.outs, bound.args[:2]
    assert isinstance(y, Place)
    fits = index.dtype == torch.int64 and is_contiguous(index) and len(y.sizes) <= RANK
    if not fits or y.dtype not in TYPES or len(table.sizes) != 2:
        return None
    return [Lowered(Kind.GATHER_ROWS, y, (table, _rows(index, 1, prod(index.sizes))))]


_OPERATORS: Final[Mapping[str, Lowering]] = MappingProxyType(
    {
        "aten._to_copy.default": _copy,
        "aten.clone.default": _copy,
        "aten.contiguous.default": _copy,
        "aten.reshape.default": _copy,
        "aten._unsafe_view.default": _copy,
        "aten.cat.default": _cat,
        "aten.add.Tensor": _binary(Kind.ADD),
        "aten.sub.Tensor": _binary(Kind.SUB),
        "aten.mul.Tensor": _binary(Kind.MUL),
        "aten.mul.Scalar": _scale,
        "aten.neg.default": _negate,
        "aten.embedding.default": _embedding,
    }
)
