"""From a recorded run to a program."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpcompiler.native import Library
from fpcompiler.native.linear import Rows
from fpcompiler.native.program import Operation, View
from fpcompiler.runtime.instructions import Instruction
from fpcompiler.runtime.native_producers import make_producer
from fpcompiler.runtime.program.arena import Arenas, Lifetime, lay_out
from fpcompiler.runtime.program.lowering import Bound, Lowered, Produced, bound, lower
from fpcompiler.runtime.program.record import (
    Buffer,
    Place,
    Plain,
    Ready,
    Recorder,
    Several,
    Source,
    places_of,
)
from fpcompiler.runtime.program.run import Item, Program, Segment, TorchStep
from fpcompiler.runtime.program.views import native_view


def build_program(
    code: Sequence[Instruction],
    recorder: Recorder,
    fixed: Mapping[str, Tensor],
    inputs: Iterable[str],
    results: Iterable[str],
    native: Library,
    arenas: Arenas,
) -> Program | None:
    """Return a program for inputs of the sizes of a recorded run.

    Args:
        code: The steps.
        recorder: What watched the run.
        fixed: Constants and state by name.
        inputs: Names of the arguments.
        results: Names of the values that are read after the last step.
        native: The library.
        arenas: Memory that programs share.

    Returns:
        None if a number depends on the values of a tensor, or if nothing runs natively.
    """
    builder = _Builder(code, recorder, fixed, tuple(inputs), tuple(results))
    return builder.program(native, arenas) if builder.classify() else None


@dataclass
class _Piece:
    """Operations between two steps of torch, or one such step."""

    operations: list[tuple[int, Lowered]] = field(default_factory=list)
    step: int = -1


class _Builder:
    def __init__(
        self,
        code: Sequence[Instruction],
        recorder: Recorder,
        fixed: Mapping[str, Tensor],
        inputs: tuple[str, ...],
        results: tuple[str, ...],
    ) -> None:
        self.code = code
        self.known = recorder.known
        self.buffers: list[Buffer] = recorder.buffers
        self.fixed, self.inputs, self.results = fixed, inputs, results
        self.pieces: list[_Piece] = []
        self.by_torch: set[str] = set()  # values that torch makes

    def classify(self) -> bool:
        """Cut the steps into pieces; return whether a program can be made of them."""
        for index, instruction in enumerate(self.code):
            item = self._bound(instruction)
            lowered = lower(item)
            if lowered is not None and all(map(self._has_fixed_vectors, lowered)):
                self._add(index, lowered)
                continue
            if any(isinstance(out, Plain) and out.value is not None for out in item.outs):
                return False  # a number that torch computes from a tensor
            self.by_torch.update(instruction.outs)
            self.pieces.append(_Piece(step=index))
        return any(piece.operations for piece in self.pieces) and not self._torch_lacks_values()

    def program(self, native: Library, arenas: Arenas) -> Program:
        """Return the program."""
        exported = {place.buffer for place in self._read_by_torch()}
        written = self._written()
        arena, arena_bytes = self._arena(written - exported)
        return Program(
            items=tuple(self._items(exported & written, arena)),
            code=self.code,
            buffers=len(self.buffers),
            arena_bytes=arena_bytes,
            fixed={self._buffer_of(n): t for n, t in self.fixed.items() if self._owns(n)},
            inputs={name: self._buffer_of(name) for name in self.inputs},
            plain={n: known.value for n, known in self.known.items() if isinstance(known, Plain)},
            results=self._as_memory(self.results),
            native=native,
            arenas=arenas,
        )

    def _bound(self, instruction: Instruction) -> Bound:
        return bound(
            instruction.step,
            instruction.function,
            instruction.args,
            instruction.kwargs,
            self.known,
            self._scratch,
        )

    def _scratch(self, nbytes: int) -> int:
        """Return a new buffer that only operations use."""
        self.buffers.append(Buffer(Source.STEP, "", nbytes))
        return len(self.buffers) - 1

    def _has_fixed_vectors(self, item: Lowered) -> bool:
        """Whether the weight and bias of a norm, if there are any, are constants."""
        places = item.produced.vectors if item.produced is not None else ()
        sources = [self.buffers[place.buffer].source for place in places if place is not None]
        return all(source is Source.FIXED for source in sources)

    def _add(self, index: int, lowered: list[Lowered]) -> None:
        if not lowered:
            return
        if not self.pieces or self.pieces[-1].step >= 0:
            self.pieces.append(_Piece())
        self.pieces[-1].operations += [(index, item) for item in lowered]

    def _torch_lacks_values(self) -> bool:
        """Whether a step of torch reads what only the library or a step without work gives."""
        steps = (self.code[piece.step].step for piece in self.pieces if piece.step >= 0)
        read = {name for step in steps for name in step.uses()} - self.by_torch
        return any(isinstance(self.known[name], Ready | Several) for name in read)

    def _buffer_of(self, name: str) -> int:
        known = self.known[name]
        assert isinstance(known, Place | Ready)
        return known.buffer

    def _owns(self, name: str) -> bool:
        return self.buffers[self._buffer_of(name)].name == name

    def _written(self) -> set[int]:
        """Return the buffers that operations make: results of steps, no state."""
        written = {item.y.buffer for piece in self.pieces for _, item in piece.operations}
        return {b for b in written if self.buffers[b].source is Source.STEP}

    def _read_by_torch(self) -> list[Place]:
        steps = (self.code[piece.step].step for piece in self.pieces if piece.step >= 0)
        names = [*(name for step in steps for name in step.uses()), *self.results]
        return [place for _, place in self._as_memory(names)]

    def _as_memory(self, names: Iterable[str]) -> tuple[tuple[str, Place], ...]:
        """Return those of some values for which there is no tensor of torch."""
        found = {}
        for name in names:
            known = self.known[name]
            there = name in self.by_torch or name in self.fixed or name in self.inputs
            if isinstance(known, Place) and not there:
                found[name] = known
        return tuple(found.items())

    def _arena(self, own: set[int]) -> tuple[dict[int, int], int]:
        """Return the place of each buffer that only operations read, and the size of all."""
        lives: dict[int, Lifetime] = {}
        at = 0
        for piece in self.pieces:
            for _, item in piece.operations:
                at += 1
                for view in (item.y, *item.x):
                    if view.buffer in own:
                        first = lives[view.buffer].first if view.buffer in lives else at
                        size = self.buffers[view.buffer].nbytes
                        lives[view.buffer] = Lifetime(size, first, at)
        return lay_out(lives)

    def _items(self, exported: set[int], arena: Mapping[int, int]) -> Iterable[Item]:
        pending, forgets, releases = set(exported), self._forgets(), self._releases()
        for number, piece in enumerate(self.pieces):
            if piece.step >= 0:
                yield self._torch_step(piece.step, forgets[number], releases[number])
                continue
            written = dict.fromkeys(item.y.buffer for _, item in piece.operations)
            new = [buffer for buffer in written if buffer in pending]
            pending -= set(new)
            yield self._segment(piece, new, arena, releases[number])

    def _torch_step(
        self, index: int, forgets: tuple[str, ...], releases: tuple[int, ...]
    ) -> TorchStep:
        instruction = self.code[index]
        views = self._as_memory(instruction.step.uses())
        outs = tuple((name, self.known[name]) for name in instruction.outs)
        return TorchStep(index, instruction, views, outs, forgets, releases)

    def _segment(
        self,
        piece: _Piece,
        new: Sequence[int],
        arena: Mapping[int, int],
        releases: tuple[int, ...],
    ) -> Segment:
        operations = (Operation * len(piece.operations))()
        for operation, (_, item) in zip(operations, piece.operations, strict=True):
            self._fill(operation, item, arena)
        return Segment(
            operations=operations,
            steps=tuple(index for index, _ in piece.operations),
            linears=tuple(item.linear for _, item in piece.operations),
            allocates=tuple(map(self._allocation, new)),
            releases=releases,
        )

    def _allocation(self, buffer: int) -> tuple[int, int, torch.dtype]:
        known = self.known[self.buffers[buffer].name]
        assert isinstance(known, Place)
        size = known.dtype.itemsize
        return buffer, -(-self.buffers[buffer].nbytes // size), known.dtype

    def _fill(self, operation: Operation, item: Lowered, arena: Mapping[int, int]) -> None:
        operation.kind, operation.scalar, operation.flag = item.kind, item.scalar, item.flag
        operation.integers[:] = item.integers
        operation.y = self._view(item.y, arena)
        for slot, view in enumerate(item.x):
            operation.x[slot] = self._view(view, arena)
        if item.linear is not None:
            weights, activations = item.linear.structures
            operation.weights = ctypes.pointer(weights)
            operation.activations = ctypes.pointer(activations)
        if item.produced is not None:
            self._fill_producer(operation, item.produced)

    def _fill_producer(self, operation: Operation, produced: Produced) -> None:
        form = produced.form
        weight, bias = map(self._address, produced.vectors)
        producer = make_producer(produced.name, produced.eps, form.types, weight, bias)
        operation.producer = ctypes.pointer(producer)
        given = [rows for rows in (form.scale, form.shift) if rows is not None]
        for slot, rows in enumerate((form.scale, form.shift)):
            operation.has_rows[slot] = rows is not None
            if rows is not None:
                operation.rows[slot] = Rows(None, *rows)
        if form.scale is None and given:  # The views have no gap; the library's slots do.
            operation.x[2] = operation.x[1]

    def _address(self, place: Place | None) -> int:
        return 0 if place is None else self.buffers[place.buffer].address + place.offset

    def _view(self, place: Place | Ready, arena: Mapping[int, int]) -> View:
        inside = place.buffer in arena
        base = len(self.buffers) if inside else place.buffer
        start = arena[place.buffer] if inside else 0
        if isinstance(place, Ready):
            return View(base=base, offset=start)
        return native_view(place, base, start + place.offset)

    def _forgets(self) -> dict[int, tuple[str, ...]]:
        """Return, for each piece of torch, the values by name that it is the last to read."""
        last: dict[str, int] = {}
        for number, piece in enumerate(self.pieces):
            if piece.step >= 0:
                step = self.code[piece.step].step
                last.update(dict.fromkeys([*step.uses(), *step.outs], number))
        found: dict[int, list[str]] = {number: [] for number in range(len(self.pieces))}
        for name, number in last.items():
            if name not in self.results:
                found[number].append(name)
        return {number: tuple(names) for number, names in found.items()}

    def _releases(self) -> dict[int, tuple[int, ...]]:
        """Return, for each piece, the buffers that nothing reads after it."""
        last: dict[int, int] = {}
        for number, piece in enumerate(self.pieces):
            for _, item in piece.operations:
                last.update(dict.fromkeys((view.buffer for view in (item.y, *item.x)), number))
            if piece.step >= 0:
                names = self.code[piece.step].step.uses()
                last.update(dict.fromkeys(self._buffers_of(names), number))
        kept = set(self._buffers_of(self.results))
        found: dict[int, list[int]] = {number: [] for number in range(len(self.pieces))}
        for buffer, number in last.items():
            if self.buffers[buffer].source is Source.STEP and buffer not in kept:
                found[number].append(buffer)
        return {number: tuple(buffers) for number, buffers in found.items()}

    def _buffers_of(self, names: Iterable[str]) -> Iterable[int]:
        for name in names:
            known = self.known[name]
            if isinstance(known, Ready):
                yield known.buffer
            yield from (place.buffer for place in places_of(known))
