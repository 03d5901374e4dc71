"""Attention of a few queries by the native library; torch's own is faster for many."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.native import library
from fpcompiler.native.program import INPUTS, Kind, Operation, View
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.program.record import Place
from fpcompiler.runtime.program.views import broadcast, native_view

MOST_QUERIES: Final = 16
"""From more on torch's attention runs, which computes blocks of queries together."""

_CAUSAL: Final = 1
_MASKED: Final = 2


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What the library is told.

    Attributes:
        views: Queries, keys, values, and a mask if there is one.
        scale: What products are multiplied with.
        flag: ``FpcOperation.flag``.
    """

    views: tuple[Place, ...]
    scale: float
    flag: int


@dataclass(frozen=True, eq=False)
class NativeAttention:
    """Called with the arguments of ``aten.scaled_dot_product_attention``.

    Attributes:
        reference: The operator, for what the library does not take.
    """

    reference: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the operator returns, up to the order of sums."""
        call = self.native_call(*args, **kwargs)
        if call is None:
            result: Tensor = self.reference(*args, **kwargs)
            return result
        tensors = _tensors(args)
        batch, heads, queries, _ = args[0].shape
        y: Tensor = args[0].new_empty(batch, queries, heads, args[2].shape[-1]).transpose(1, 2)
        _attend(call, tensors, y)
        return y

    def native_call(self, *args: Any, **kwargs: Any) -> AttentionCall | None:
        """Return what the library is told; None if the operator runs for these arguments."""
        if torch.compiler.is_compiling() or library() is None:
            return None
        tensors = _tensors(args)
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        q, k, v, *mask = (_place(tensor, base) for base, tensor in enumerate(tensors))
        return attention_call(q, k, v, mask[0] if mask else None, *args[INPUTS:], **kwargs)


def attention_call(
    q: Place,
    k: Place,
    v: Place,
    mask: Place | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall | None:
    """Return what to tell the library, or None if it does not take these arguments.

    Arguments are those of ``aten.scaled_dot_product_attention``; queries [B, H, M, D], keys
    [B, G, N, D], values [B, G, N, E] and the mask are places.
    """
    if dropout or not _fit(q, k, v, enable_gqa) or q.sizes[2] > MOST_QUERIES:
        return None
    views: tuple[Place, ...] = (q, k, v)
    if mask is not None:
        wanted = (*q.sizes[:3], k.sizes[2])
        if mask.dtype not in (torch.bool, torch.float32) or not _spreads(mask, wanted):
            return None
        views = (*views, broadcast(mask, wanted))
    scale = 1 / math.sqrt(q.sizes[-1]) if scale is None else scale
    return AttentionCall(views, scale, _CAUSAL * causal + _MASKED * (mask is not None))


def _fit(q: Place, k: Place, v: Place, enable_gqa: bool) -> bool:
    views = (q, k, v)
    known = all(len(x.sizes) == 4 and x.dtype == torch.float32 for x in views)
    if not known or any(0 in x.sizes or x.strides[-1] != 1 for x in views):
        return False
    groups = q.sizes[1] == k.sizes[1] or (enable_gqa and q.sizes[1] % k.sizes[1] == 0)
    same = q.sizes[0] == k.sizes[0] and q.sizes[3] == k.sizes[3] and k.sizes[:3] == v.sizes[:3]
    return groups and same


def _spreads(mask: Place, sizes: tuple[int, ...]) -> bool:
    missing = len(sizes) - len(mask.sizes)
    own = zip(mask.sizes, sizes[missing:], strict=True)
    return missing >= 0 and all(a in (1, b) for a, b in own)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [arg for arg in args[:INPUTS] if isinstance(arg, Tensor)]


def _place(tensor: Tensor, base: int) -> Place:
    return Place(base, 0, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _attend(call: AttentionCall, tensors: list[Tensor], y: Tensor) -> None:
    native = library()
    assert native is not None
    own = _place(y, len(tensors))
    views = [native_view(view, view.buffer, 0) for view in call.views]
    operation = Operation(
        kind=Kind.ATTENTION, scalar=call.scale, flag=call.flag,
        y=native_view(own, own.buffer, 0), x=(View * INPUTS)(*views),
    )  # fmt: skip
    bases = (ctypes.c_void_p * (len(tensors) + 1))(*(t.data_ptr() for t in [*tensors, y]))
    stopped = ctypes.c_int64()
    status = native.functions.fpc_run(
        operation, 1, bases, torch.get_num_threads(), native.instructions, stopped, None
    )
    if status:
        raise MemoryError(f"no memory for the scores of {call.views[1].sizes[2]} keys")
