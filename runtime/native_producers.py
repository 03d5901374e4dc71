"""The tensors of a fused quantizer as the native library takes them.

The library computes and quantizes one row at a time. What lies in memory in a way that it does not
take is left to :func:`fpcompiler.runtime.fused.produce`, and so is everything that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Final, NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from fpcompiler.native.linear import Producer, Rows
from fpcompiler.numerics.compiled import INPUTS
from fpcompiler.runtime.fused import HEADS, PRODUCERS, SLOTS, TAILS

_HEADS: Final = tuple(HEADS)
_TAILS: Final = tuple(TAILS)
_Given = TypeVarTuple("_Given")
_Found = TypeVar("_Found")


class Produced(NamedTuple):
    """Values that are not computed yet.

    Attributes:
        x: What they are computed from, ``[..., C]``.
        stride: From one row of ``x`` to the next, in values.
        producer: How; ``FpcProducer``.
        scale: What the tail multiplies with.
        shift: What the tail adds.
    """

    x: Tensor
    stride: int
    producer: Producer
    scale: Rows | None
    shift: Rows | None


class Form(NamedTuple):
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class RowsForm(NamedTuple):
    """Where the rows of a tensor beside ``x`` are, from its address on.

    Attributes:
        repeat: Rows of ``x`` that share a row.
        stride: Bytes from one row to the next.
        type: ``FpcInput``.
    """

    repeat: int
    stride: int
    type: int


class ProducedForm(NamedTuple):
    """What :func:`form_of_rows` found out from the forms of tensors.

    Attributes:
        stride: From one row of ``x`` to the next, in values; None if ``x`` must be copied first.
        types: ``FpcInput`` of a norm's weight and bias.
        scale, shift: What the tail reads, or None.
    """

    stride: int | None
    types: tuple[int, int]
    scale: RowsForm | None
    shift: RowsForm | None


def describe(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
) -> Produced | None:
    """Return what :func:`fpcompiler.runtime.fused.produce` would compute.

    The arguments are those of ``produce``. Their addresses are in the result, so they must live
    until it has been used.

    Returns:
        None if the library does not take these tensors.
    """
    tensors = (x, weight, bias, scale, shift)
    if not all(tensor is None or tensor.is_cpu for tensor in tensors):
        return None
    form = form_of_rows(producer, *map(_form, tensors))
    if form is None:
        return None
    stride = form.stride
    if stride is None:
        x, stride = x.contiguous(), x.shape[-1]
    own = make_producer(producer, eps, form.types, _address(weight), _address(bias))
    rows = _rows(scale, form.scale), _rows(shift, form.shift)
    return Produced(x, stride, own, *rows)


def remembered(
    most: int,
) -> Callable[[Callable[[*_Given], _Found]], Callable[[*_Given], _Found]]:
    """Remember results of a function, but not while torch.compile traces calls of it.

    It looks through caches, as it should here, and warns of each.

    Args:
        most: How many results.
    """

    def decorated(function: Callable[[*_Given], _Found]) -> Callable[[*_Given], _Found]:
        cached = lru_cache(maxsize=most)(function)

        @wraps(function)
        def call(*args: *_Given) -> _Found:
            return function(*args) if torch.compiler.is_compiling() else cached(*args)

        return call

    return decorated


@remembered(4096)
def form_of_rows(
    producer: str,
    x: Form | None,
    weight: Form | None,
    bias: Form | None,
    scale: Form | None,
    shift: Form | None,
) -> ProducedForm | None:
    """Return how the library is told of tensors, or None if it does not take them."""
    slots = (weight is not None, bias is not None, scale is not None, shift is not None)
    if x is None or not _is_known(producer, slots) or x.dtype not in INPUTS or not x.shape:
        return None
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return None
    vectors = [form for form in (weight, bias) if form is not None]
    if not all(_is_vector(form, x, producer) for form in vectors):
        return None
    rows = [None if form is None else _rows_form(form, x.shape) for form in (scale, shift)]
    if any(
        form is not None and row is None for form, row in zip((scale, shift), rows, strict=True)
    ):
        return None
    place = _place(*x[:2], x.shape)
    types = (0 if form is None else INPUTS[form.dtype] for form in (weight, bias))
    stride = place[1] if place is not None and place[0] == 1 else None
    first, second = types
    return ProducedForm(stride, (first, second), *rows)


def takes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
) -> bool:
    """Return whether the library takes such tensors, once they lie in memory as it wants."""
    forms = [None if t is None else _packed(t) for t in (x, weight, bias, scale, shift)]
    return form_of_rows(producer, *forms) is not None


def _packed(tensor: Tensor) -> Form:
    """Return the form of a tensor with sizes of one, which hold for any sizes, without gaps."""
    shape = (*(1 for _ in tensor.shape[:-1]), *map(int, tensor.shape[-1:]))
    strides = (*(shape[-1] for _ in shape[:-1]), *(1 for _ in shape[-1:]))
    return Form(shape, strides, tensor.dtype)


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None, form: RowsForm | None) -> Rows | None:
    return None if tensor is None or form is None else Rows(tensor.data_ptr(), *form)


def _is_vector(vector: Form, x: Form, producer: str) -> bool:
    """Return whether the library takes a norm's weight or bias; ``layer_norm`` refuses some."""
    if vector.dtype not in INPUTS or vector.shape != x.shape[-1:]:
        return False
    own = vector.dtype
    known = own == x.dtype or own == torch.float32 or not producer.startswith("layer_norm")
    return known and (vector.strides == (1,) or vector.shape == (1,))


def _rows_form(form: Form, shape: tuple[int, ...]) -> RowsForm | None:
    place = _place(form.shape, form.strides, shape) if form.dtype in INPUTS else None
    if place is None:
        return None
    repeat, stride = place
    return RowsForm(repeat, stride * form.dtype.itemsize, INPUTS[form.dtype])


def _place(
    shape: tuple[int, ...], strides: tuple[int, ...], to: tuple[int, ...]
) -> tuple[int, int] | None:
    """Return where the rows of a tensor are that is broadcast to a shape.

    Args:
        shape: Of the tensor.
        strides: Of the tensor.
        to: The shape, which ends with the same channels.

    Returns:
        ``repeat`` and ``stride``: row ``r`` begins ``r // repeat * stride`` values behind the first
        one. None if no such numbers say it.
    """
    missing = len(to) - len(shape)
    if missing < 0 or not shape or shape[-1] != to[-1] or (strides[-1] != 1 and shape[-1] != 1):
        return None
    axes = [(size, 0) for size in to[:missing]]
    for own, stride, size in zip(shape[:-1], strides[:-1], to[missing:-1], strict=True):
        if own not in (1, size):
            return None
        axes.append((size, stride if own == size else 0))
    axes = [axis for axis in axes if axis[0] != 1]
    repeat = 1
    while axes and axes[-1][1] == 0:
        repeat *= axes.pop()[0]
    if not axes:
        return max(repeat, 1), 0
    stride = reach = axes[-1][1]
    for own, step in reversed(axes):
        if step != reach:
            return None
        reach = step * own
    return max(repeat, 1), stride


@remembered(1024)
def _is_known(name: str, slots: tuple[bool, ...]) -> bool:
    given = frozenset(slot for slot, there in zip(SLOTS, slots, strict=True) if there)
    return name in PRODUCERS and not PRODUCERS[name].problem(given)


def activation_code(name: str) -> int:
    """Return the ``FpcHead`` of an activation; -1 for an empty name."""
    return _HEADS.index(name) if name else -1


@lru_cache(maxsize=1024)
def make_producer(
    name: str, eps: float, types: tuple[int, int], weight: int, bias: int
) -> Producer:
    """Return the structure for a producer; addresses are 0 for what it does not read."""
    found = PRODUCERS[name]
    return Producer(
        head=_HEADS.index(found.head),
        tail=_TAILS.index(found.tail),
        eps=eps,
        weight_type=types[0],
        bias_type=types[1],
        weight=weight or None,
        bias=bias or None,
    )
