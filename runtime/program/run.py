"""A program, and how it runs: pieces for the native library, and steps of torch between them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fpcompiler.errors import FpcompilerError
from fpcompiler.native import Library
from fpcompiler.native.program import OUT_OF_RANGE
from fpcompiler.numerics.compiled import NO_MEMORY
from fpcompiler.numerics.scaling import not_finite
from fpcompiler.runtime import operators
from fpcompiler.runtime.instructions import STEP_ERRORS, Instruction, step_error
from fpcompiler.runtime.native import NativeLinear, PreparedInput
from fpcompiler.runtime.program.arena import Arenas
from fpcompiler.runtime.program.record import Known, Place, Ready, Several


class ChangedError(Exception):
    """A step of torch gave a result of another form than when the program was made."""


@dataclass(frozen=True)
class TorchStep:
    """A step that torch runs.

    Attributes:
        index: Of the step.
        instruction: The step.
        views: Values that it reads and that are there as memory only.
        outs: What its results were when the program was made.
        forgets: Values that nothing reads any more.
        releases: Buffers that nothing reads any more.
    """

    index: int
    instruction: Instruction
    views: tuple[tuple[str, Place], ...]
    outs: tuple[tuple[str, Known], ...]
    forgets: tuple[str, ...]
    releases: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Operations that the native library runs without interruption.

    Attributes:
        operations: An array of ``FpcOperation``.
        steps: The index of the step of each.
        linears: The layer that each belongs to, if it needs one.
        allocates: Buffers that others read later, with their number of values and dtype.
        releases: Buffers that nothing reads any more.
    """

    operations: Any
    steps: tuple[int, ...]
    linears: tuple[NativeLinear | None, ...]
    allocates: tuple[tuple[int, int, torch.dtype], ...]
    releases: tuple[int, ...]


Item: TypeAlias = TorchStep | Segment


@dataclass
class Run:
    """What a run holds.

    Attributes:
        values: Tensors and numbers by name.
        owners: What keeps the memory of each buffer.
        bases: Where the memory of each buffer starts.
    """

    values: dict[str, Any]
    owners: list[Any]
    bases: Any

    def own(self, buffer: int, owner: Tensor | PreparedInput) -> None:
        """Keep what a buffer is from now on."""
        self.owners[buffer] = owner
        at_storage = isinstance(owner, Tensor)
        self.bases[buffer] = owner.untyped_storage().data_ptr() if at_storage else owner.address  # type: ignore[union-attr]

    def view(self, place: Place) -> Tensor:
        """Return a place as a tensor."""
        offset = place.offset // place.dtype.itemsize
        result: Tensor = self.owners[place.buffer].as_strided(place.sizes, place.strides, offset)
        return result


@dataclass(frozen=True)
class Program:
    """A plan for inputs of given sizes.

    Attributes:
        items: What runs, in order.
        code: All steps of the plan, for errors.
        buffers: How many there are; the arena is the one after them.
        arena_bytes: Size of the memory for values that only operations read.
        fixed: The constants and the state, by buffer.
        inputs: The buffer of each argument by name.
        plain: Values that are no tensors.
        results: Values that the plan returns or stores and that are there as memory only.
        native: The library.
        arenas: Memory that programs share.
    """

    items: tuple[Item, ...]
    code: Sequence[Instruction]
    buffers: int
    arena_bytes: int
    fixed: Mapping[int, Tensor]
    inputs: Mapping[str, int]
    plain: Mapping[str, Any]
    results: tuple[tuple[str, Place], ...]
    native: Library
    arenas: Arenas

    @cached_property
    def _start(self) -> Run:
        """What every run starts with: where constants and the state are."""
        bases = (ctypes.c_void_p * (self.buffers + 1))()
        run = Run({}, [None] * len(bases), bases)
        for buffer, tensor in self.fixed.items():
            run.own(buffer, tensor)
        return run

    def run(self, values: dict[str, Any], times: list[tuple[int, int]] | None = None) -> None:
        """Run, with the arguments, the constants and the state in ``values``; results come to it.

        Args:
            values: Tensors by name.
            times: Gets the index of the step and the nanoseconds of each operation and of each
                step of torch, in the order in which they ran.

        Raises:
            ChangedError: If a step of torch gave a result of another form than before.
            RunError: If a step fails.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        arena = self.arenas.take(self.arena_bytes)
        try:
            self._run(values, arena, times)
        finally:
            self.arenas.give_back(arena)

    def _run(
        self, values: dict[str, Any], arena: Tensor, times: list[tuple[int, int]] | None
    ) -> None:
        values.update(self.plain)
        start = self._start
        run = Run(values, [*start.owners], type(start.bases).from_buffer_copy(start.bases))
        for name, buffer in self.inputs.items():
            run.own(buffer, values[name])
        run.own(self.buffers, arena)
        for item in self.items:
            if isinstance(item, Segment):
                self._run_segment(item, run, times)
            else:
                _run_step(item, run, times)
        for name, place in self.results:
            values[name] = run.view(place)

    def _run_segment(self, segment: Segment, run: Run, times: list[tuple[int, int]] | None) -> None:
        for buffer, count, dtype in segment.allocates:
            run.own(buffer, torch.empty(count, dtype=dtype))
        stopped, count = ctypes.c_int64(), len(segment.steps)
        spent = (ctypes.c_int64 * count)() if times is not None else None
        status = self.native.functions.fpc_run(
            segment.operations, count, run.bases, torch.get_num_threads(),
            self.native.instructions, stopped, spent,
        )  # fmt: skip
        if status:
            raise self._error(status, segment, stopped.value)
        if times is not None and spent is not None:
            times.extend(zip(segment.steps, spent[:], strict=True))
        for buffer in segment.releases:
            run.owners[buffer] = None

    def _error(self, status: int, segment: Segment, operation: int) -> Exception:
        index = segment.steps[operation]
        step = self.code[index].step
        if status == OUT_OF_RANGE:
            return step_error(step, index, IndexError("an index is out of range"))
        if status == NO_MEMORY:
            return step_error(step, index, MemoryError("there is not enough memory"))
        linear = segment.linears[operation]
        assert linear is not None
        assert linear.kind.operand is not None
        return not_finite(linear.kind.operand, str(step.args[-1]))


def _run_step(item: TorchStep, run: Run, times: list[tuple[int, int]] | None) -> None:
    values = run.values
    for name, place in item.views:
        values[name] = run.view(place)
    instruction = item.instruction
    try:
        args = operators.fill(instruction.args, values)
        kwargs = {k: operators.fill(v, values) for k, v in instruction.kwargs.items()}
        if times is None:
            result = instruction.function(*args, **kwargs)
        else:
            before = time.perf_counter_ns()
            result = instruction.function(*args, **kwargs)
            times.append((item.index, time.perf_counter_ns() - before))
    except FpcompilerError:
        raise
    except STEP_ERRORS as error:
        raise step_error(instruction.step, item.index, error) from error
    results = result if instruction.spread else [result]
    for (name, known), value in zip(item.outs, results, strict=True):
        values[name] = value
        pairs = (
            zip(known.items, value, strict=True) if isinstance(known, Several) else [(known, value)]
        )
        for one, own in pairs:
            _check(one, own)
            if isinstance(one, Place | Ready):
                run.own(one.buffer, own)
    for name in item.forgets:
        del values[name]
    for buffer in item.releases:
        run.owners[buffer] = None


def _check(known: Known, value: Any) -> None:
    """Compare a result with what it was when the program was made."""
    if isinstance(known, Place):
        same = (
            isinstance(value, Tensor)
            and value.shape == known.sizes
            and value.stride() == known.strides
            and value.storage_offset() * value.element_size() == known.offset
        )
    elif isinstance(known, Ready):
        same = isinstance(value, PreparedInput) and value.rows == known.rows
    else:
        same = True
    if not same:
        raise ChangedError
