"""Where the values of a run are: which of them share memory, with what sizes and strides."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fpcompiler.plan import Step
from fpcompiler.runtime.instructions import Instruction
from fpcompiler.runtime.native import PreparedInput
from fpcompiler.runtime.operators import Function


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in memory.

    Attributes:
        buffer: Index of the memory, in :attr:`Recorder.buffers`.
        offset: Bytes from its start.
        sizes, strides: As torch has them; strides are in values.
        dtype: Of the values.
    """

    buffer: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Ready:
    """Activations that are ready to be multiplied; a buffer of their own."""

    buffer: int
    rows: int


@dataclass(frozen=True, slots=True)
class Plain:
    """A value that is no tensor, and the same for all inputs of these sizes."""

    value: Any


@dataclass(frozen=True, slots=True)
class Several:
    """A list of tensors."""

    items: tuple[Place, ...]


Known: TypeAlias = Place | Ready | Plain | Several


class Source(enum.Enum):
    """Where memory comes from."""

    FIXED = enum.auto()
    """A constant or the state: the same memory in every run."""
    INPUT = enum.auto()
    """An argument of the call."""
    STEP = enum.auto()
    """The result of a step."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that values share.

    Attributes:
        source: Where it comes from.
        name: The value that it was made for; the others are views of that one.
        nbytes: Its size.
        address: Where it is, if that is the same in every run.
    """

    source: Source
    name: str
    nbytes: int
    address: int = 0


class Recorder:
    """Watches a run step by step.

    Args:
        code: The steps.
        fixed: Constants and state by name.
        inputs: The arguments by name.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        fixed: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        self.known: dict[str, Known] = {}
        self.buffers: list[Buffer] = []
        self._code = code
        self._step = 0
        self._live: dict[tuple[int, torch.dtype], int] = {}
        self._keys: dict[int, tuple[int, torch.dtype]] = {}
        self._names: Counter[int] = Counter()
        for name, tensor in fixed.items():
            self._define(name, tensor, Source.FIXED)
        for name, tensor in inputs.items():
            self._define(name, tensor, Source.INPUT)

    def call(self, step: Step, function: Function, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run a step and remember where its results are."""
        result = function(*args, **kwargs)
        instruction = self._code[self._step]
        results = result if instruction.spread else [result]
        for name, value in zip(step.outs, results, strict=True):
            self._define(name, value, Source.STEP)
        self._forget(instruction.frees)
        self._step += 1
        return result

    def _define(self, name: str, value: Any, source: Source) -> None:
        if isinstance(value, PreparedInput):
            size = value.memory.nbytes
            self.known[name] = Ready(self._buffer(name, source, size), value.rows)
        elif isinstance(value, Tensor):
            self.known[name] = self._place(name, value, source)
        elif isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value):
            self.known[name] = Several(tuple(self._place(name, v, source) for v in value))
        else:
            self.known[name] = Plain(value)

    def _place(self, name: str, tensor: Tensor, source: Source) -> Place:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype)
        buffer = self._live.get(key)
        if buffer is None:
            fixed = source is Source.FIXED
            buffer = self._buffer(name, source, storage.nbytes(), key[0] if fixed else 0)
            if key[0]:  # Empty tensors have no memory to share.
                self._live[key], self._keys[buffer] = buffer, key
        self._names[buffer] += 1
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return Place(buffer, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def _buffer(self, name: str, source: Source, nbytes: int, address: int = 0) -> int:
        self.buffers.append(Buffer(source, name, nbytes, address))
        return len(self.buffers) - 1

    def _forget(self, names: Iterable[str]) -> None:
        """Forget values: their memory may become that of others."""
        for place in (place for name in names for place in places_of(self.known[name])):
            self._names[place.buffer] -= 1
            if not self._names[place.buffer] and place.buffer in self._keys:
                del self._live[self._keys.pop(place.buffer)]


def places_of(known: Known) -> tuple[Place, ...]:
    """Return the tensors of a value."""
    if isinstance(known, Several):
        return known.items
    return (known,) if isinstance(known, Place) else ()
