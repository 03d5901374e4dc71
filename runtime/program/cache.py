"""The programs of an executor, one for each set of input sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

from torch import Size, Tensor

from fpcompiler.native import Library
from fpcompiler.runtime.instructions import Instruction
from fpcompiler.runtime.program.arena import Arenas
from fpcompiler.runtime.program.build import build_program
from fpcompiler.runtime.program.record import Recorder
from fpcompiler.runtime.program.run import ChangedError, Program

_MOST: Final = 32
"""Programs that are kept; the one that was made first goes."""

_Sizes: TypeAlias = tuple[Size, ...]


class Steps(Protocol):
    """Runs steps one by one."""

    def __call__(self, values: dict[str, Any], *, caller: Callable[..., Any] | None = None) -> None:
        """Run on values by name, each step by what is given."""


class ProgramCache:
    """Runs steps, and programs where these were seen before with inputs of the same sizes.

    Args:
        code: The steps.
        fixed: Constants and state by name.
        inputs: Names of the arguments.
        results: Names of the values that are read after the last step.
        native: The library.
        steps: What runs them one by one.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        fixed: Mapping[str, Tensor],
        inputs: Iterable[str],
        results: Iterable[str],
        native: Library,
        steps: Steps,
    ) -> None:
        self._code = code
        self._fixed = fixed
        self._inputs = tuple(inputs)
        self._results = tuple(dict.fromkeys(results))
        self._native = native
        self._arenas = Arenas()
        self._steps = steps
        self._found: dict[_Sizes, Program | None] = {}
        self._seen: dict[_Sizes, None] = {}

    def run(
        self, values: dict[str, Any], times: list[tuple[int, int]] | None = None
    ) -> Program | None:
        """Compute the results in ``values``, which has the inputs, the constants and the state.

        Args:
            values: By name.
            times: Gets the index of the step and the nanoseconds of each native operation and of
                each step of torch, if a program runs; an empty list.

        Returns:
            The program that ran, or None if the steps ran one by one.
        """
        sizes = tuple(values[name].shape for name in self._inputs)
        if sizes not in self._seen:
            self._seen = _latest(self._seen, sizes, None)
            self._steps(values)
            return None
        for name in self._inputs:
            values[name] = _whole(values[name])
        if sizes not in self._found:
            self._found = _latest(self._found, sizes, self._record(values))
            return None
        program = self._found[sizes]
        if program is None:
            self._steps(values)
            return None
        before = dict(values)
        try:
            program.run(values, times)
        except ChangedError:
            self._found[sizes] = None
            if times is not None:
                times.clear()
            values.clear()
            values.update(before)
            self._steps(values)
            return None
        return program

    def find(self, inputs: Iterable[Tensor]) -> Program | None:
        """Return the program for inputs of these sizes, if there is one by now."""
        return self._found.get(tuple(tensor.shape for tensor in inputs))

    def _record(self, values: dict[str, Any]) -> Program | None:
        # Arguments that are one tensor now may be two in another call.
        values.update({name: values[name].clone() for name in self._inputs})
        inputs = {name: values[name] for name in self._inputs}
        recorder = Recorder(self._code, self._fixed, inputs)
        self._steps(values, caller=recorder.call)
        return build_program(
            self._code,
            recorder,
            self._fixed,
            self._inputs,
            self._results,
            self._native,
            self._arenas,
        )


def _whole(tensor: Tensor) -> Tensor:
    """Return values that lie in order, from the start of their memory on."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.storage_offset() else tensor


def _latest(table: dict[_Sizes, Any], key: _Sizes, value: Any) -> dict[_Sizes, Any]:
    """Return a table with one more entry, the oldest ones left out if there are many."""
    kept = list(table.items())[-_MOST + 1 :]
    return {**dict(kept), key: value}
