"""Attention of a few queries on a GPU: which kernels there can be, and the step that runs one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fpcompiler.errors import FormatError
from fpcompiler.runtime.cuda.operators import open_library, problem_texts
from fpcompiler.runtime.operators import Function

ATTENTION: Final = "attention"
"""The role of libraries of kernels in an artifact."""

OPERATOR: Final = "aten.scaled_dot_product_attention.default"
"""The operator in a plan."""

WIDTHS: Final = (64, 128)
"""Sizes of heads."""

CACHES: Final = ("f8E4M3FN",)
"""Formats of keys and values that kernels read where queries are bf16: weights times scales would
leave the range of fp16."""

MOST_ROWS: Final = 16
"""Queries that read one head of keys; ``kMostRows`` of steps.h."""

_TYPES: Final = {torch.float16: "f16", torch.bfloat16: "bf16"}
_MOST_HEADS: Final = 65535
"""Heads of keys of all texts: blocks of a launch along y."""

_RANK: Final = 4
_INPUTS: Final = 3


@dataclass(frozen=True)
class AttendProblem:
    """What a kernel of attention is made for; all else are its arguments.

    Attributes:
        type: Of queries, keys, values and results: ``bf16`` or ``f16``.
        width: Size of a head, one of :data:`WIDTHS`.
        cache: The format of keys and values with a scale for each, one of :data:`CACHES`; empty if
            they are of the type.
    """

    type: str
    width: int
    cache: str = ""

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            FormatError: If there can be no such kernel.
        """
        known = self.type in _TYPES.values() and self.width in WIDTHS
        if not known or (self.cache and (self.cache not in CACHES or self.type != "bf16")):
            raise FormatError(f"there is no kernel of attention for {self}.")

    @property
    def key(self) -> tuple[str, int, str]:
        """What it is looked up by at each call."""
        return self.type, self.width, self.cache

    def __str__(self) -> str:
        """Return a text that differs where problems do."""
        return f"attend {self.type} {self.width} {self.cache}".rstrip()


class CachedRows(NamedTuple):
    """Keys or values of eight bits that only attention reads.

    Attributes:
        codes: uint8 ``[B, G, N, D]``.
        scale: fp32 ``[B, G, N, 1]``.
        format: Of the codes.
        dtype: Of their values.
    """

    codes: Tensor
    scale: Tensor
    format: str
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        return self.codes.shape

    def stride(self, axis: int) -> int:
        """Return that of the codes."""
        return self.codes.stride(axis)

    def values(self) -> Tensor:
        """Return the values."""
        parts, operand = [self.codes, self.scale], f"{self.format}@token:f32"
        values: Tensor = torch.ops.fpc.dequantize(parts, operand, self.dtype)
        return values


Rows: TypeAlias = Tensor | CachedRows


@dataclass(frozen=True)
class Call:
    """The arguments of a call of the operator."""

    q: Tensor
    k: Rows
    v: Rows
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return the arguments as the operator gets them."""
        names = {"attn_mask": "mask", "dropout_p": "dropout", "is_causal": "causal",
                 "enable_gqa": "grouped"}  # fmt: skip
        return cls(*args, **{names.get(name, name): value for name, value in kwargs.items()})


def problem_of(call: Call) -> AttendProblem | None:
    """Return what a kernel must be made for to run calls like one, if there are few queries.

    Returns:
        None if no kernel can, however many there are.
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    if call.dropout or any(len(x.shape) != _RANK or x.stride(-1) != 1 for x in (q, k, v)):
        return None
    width, dtypes = q.shape[3], {q.dtype, k.dtype, v.dtype}
    same = k.shape[3] == v.shape[3] == width and k.shape[1:3] == v.shape[1:3]
    if not same or not q.shape[0] == k.shape[0] == v.shape[0]:
        return None
    if width not in WIDTHS or len(dtypes) > 1 or q.dtype not in _TYPES:
        return None
    if mask is not None and (mask.dtype != torch.bool or mask.ndim > _RANK or call.causal):
        return None
    caches = {x.format if isinstance(x, CachedRows) else "" for x in (k, v)}
    return None if len(caches) > 1 else _problem(_TYPES[q.dtype], width, caches.pop())


def _problem(kind: str, width: int, cache: str) -> AttendProblem | None:
    return None if cache and kind != "bf16" else AttendProblem(kind, width, cache)


def is_small(call: Call) -> bool:
    """Return whether a kernel takes so many queries, in such groups."""
    (heads, queries), (groups, keys) = call.q.shape[1:3], call.k.shape[1:3]
    shared = groups == heads or (call.grouped and groups > 0 and heads % groups == 0)
    some = keys > 0 and 0 < len(call.q) * groups <= _MOST_HEADS
    return bool(shared and some and 0 < heads // groups * queries <= MOST_ROWS)


@dataclass(frozen=True)
class AttendKernels:
    """The kernels of some libraries: the library and the number in it, by :attr:`~.key`."""

    places: Mapping[tuple[str, int, str], tuple[int, int]]

    @property
    def reads_caches(self) -> bool:
        """Whether there is one that reads keys and values of eight bits."""
        return any(cache for _, _, cache in self.places)

    @classmethod
    def of(cls, paths: list[Path]) -> AttendKernels:
        """Return the kernels of libraries. Loading one runs its code: the caller vouches for it.

        Raises:
            ArtifactError: If one is no such library.
        """
        places: dict[tuple[str, int, str], tuple[int, int]] = {}
        for path in paths:
            number = open_library(path)
            for index, text in enumerate(problem_texts(path, "attend")):
                places.setdefault(_problem_of(text).key, (number, index))
        return cls(places)


NO_ATTENTION: Final = AttendKernels({})


@dataclass(frozen=True, eq=False)
class CudaAttention:
    """Called with the arguments of ``aten.scaled_dot_product_attention``.

    Attributes:
        kernels: The kernels that there are.
        sms: Multiprocessors of the GPU.
        reference: The operator, for what they do not take.
    """

    kernels: AttendKernels
    sms: int
    reference: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the operator returns, up to roundings."""
        call = Call.of(args, kwargs)
        problem = problem_of(call)
        place = None if problem is None else self.kernels.places.get(problem.key)
        if place is None or not is_small(call):
            q, *rows = (x.values() if isinstance(x, CachedRows) else x for x in args[:_INPUTS])
            result: Tensor = self.reference(q, *rows, *args[_INPUTS:], **kwargs)
            return result
        scale = 1 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale
        sizes = (*call.q.shape[:3], call.k.shape[2])
        mask = None if call.mask is None else call.mask.expand(sizes)
        y: Tensor = torch.ops.fpc_cuda.attend(
            *place, call.q, *_parts(call.k), *_parts(call.v), mask, float(scale), call.causal,
            self.sms,
        )  # fmt: skip
        return y.transpose(1, 2)


def _parts(rows: Rows) -> tuple[Tensor, Tensor | None]:
    return (rows.codes, rows.scale) if isinstance(rows, CachedRows) else (rows, None)


def _problem_of(text: str) -> AttendProblem:
    _, kind, width, *cache = text.split()
    return AttendProblem(kind, int(width), *cache)
