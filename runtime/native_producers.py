"""The tensors of a fused quantizer as the native library takes them.

The library computes and quantizes one row at a time. What lies in memory in a way that it does not
take is left to :func:`fpcompiler.runtime.fused.produce`, and so is everything that is an error.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.native.linear import Producer, Rows
from fpcompiler.numerics.compiled import INPUTS
from fpcompiler.runtime.fused import HEADS, PRODUCERS, SLOTS, TAILS

_HEADS: Final = tuple(HEADS)
_TAILS: Final = tuple(TAILS)


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
    slots = (weight is not None, bias is not None, scale is not None, shift is not None)
    if not _is_known(producer, slots) or not _is_plain(x) or x.dim() == 0:
        return None
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return None
    shape = x.shape
    vectors = [0, 0, 0, 0]
    for index, vector in enumerate((weight, bias)):
        if vector is None:
            continue
        if not _is_vector(vector, shape[-1], x.dtype, producer):
            return None
        vectors[2 * index : 2 * index + 2] = vector.data_ptr(), INPUTS[vector.dtype]
    rows: list[Rows | None] = [None, None]
    for index, operand in enumerate((scale, shift)):
        if operand is None:
            continue
        rows[index] = _rows(operand, shape)
        if rows[index] is None:
            return None
    place = _place(shape, x.stride(), shape)
    if place is None or place[0] != 1:
        x, place = x.contiguous(), (1, shape[-1])
    return Produced(x, place[1], _producer(producer, eps, *vectors), *rows)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype in INPUTS


def _is_vector(tensor: Tensor, channels: int, dtype: torch.dtype, producer: str) -> bool:
    """Return whether the library takes a norm's weight or bias; ``layer_norm`` refuses some."""
    if not _is_plain(tensor) or tensor.dim() != 1 or not tensor.is_contiguous():
        return False
    own = tensor.dtype
    known = own == dtype or own == torch.float32 or not producer.startswith("layer_norm")
    return known and tensor.numel() == channels


def _rows(tensor: Tensor, shape: torch.Size) -> Rows | None:
    if not _is_plain(tensor):
        return None
    place = _place(tensor.shape, tensor.stride(), shape)
    if place is None:
        return None
    repeat, stride = place
    return Rows(tensor.data_ptr(), repeat, stride * tensor.itemsize, INPUTS[tensor.dtype])


@lru_cache(maxsize=4096)
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


@lru_cache(maxsize=1024)
def _is_known(name: str, slots: tuple[bool, ...]) -> bool:
    given = frozenset(slot for slot, there in zip(SLOTS, slots, strict=True) if there)
    return name in PRODUCERS and not PRODUCERS[name].problem(given)


@lru_cache(maxsize=1024)
def _producer(
    name: str, eps: float, weight: int, weight_type: int, bias: int, bias_type: int
) -> Producer:
    found = PRODUCERS[name]
    return Producer(
        head=_HEADS.index(found.head),
        tail=_TAILS.index(found.tail),
        eps=eps,
        weight_type=weight_type,
        bias_type=bias_type,
        weight=weight or None,
        bias=bias or None,
    )
