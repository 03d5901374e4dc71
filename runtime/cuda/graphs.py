"""Which calls are recorded as CUDA graphs, and how long graphs are kept.

A call is known by the sizes of its tensors; there is nothing else in a call of a plan. The second
call with the same sizes is recorded, later ones replay it: the tensors are copied to where the
graph reads them, and what it writes is copied out. The state (KV caches) stays where it is.

What cannot be recorded runs step by step from then on, and :class:`GraphRow` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, final

from torch import Tensor

from fpcompiler.errors import OptionError

Run: TypeAlias = Callable[[Sequence[Tensor]], list[Any]]
"""Computes the results of a call. With the same tensors it may run any number of times."""

Finish: TypeAlias = Callable[[list[Any]], list[Any]]
"""From these results to the outputs; waits for them, and raises if a value was NaN."""

_REMEMBERED: Final = 256
"""Of how many sizes it is known how often they were called; those not called for longest go."""

_LOG: Final = logging.getLogger("fpcompiler.runtime")


@dataclass(frozen=True)
class GraphOptions:
    """How graphs are kept.

    Attributes:
        most: Graphs of a model at once; the one that was not used for longest goes.
        share: The part of the GPU's memory that all graphs of a model may take.
        copies: Whether outputs are tensors of their own. Otherwise they are valid until the next
            call of the model, which saves copying them.

    Raises:
        OptionError: If a number is out of range.
    """

    most: int = 16
    share: float = 0.125
    copies: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.most < 1 or not 0 < self.share <= 1:
            raise OptionError(
                f"GraphOptions: most must be at least 1 and share between 0 and 1, got {self.most} "
                f"and {self.share}. For no graphs at all use graphs=False."
            )


@dataclass(frozen=True)
class GraphRow:
    """What became of calls with the same sizes.

    Attributes:
        sizes: Of each tensor.
        calls: How many there were since the model was loaded, or since the sizes were forgotten.
        replays: How many of them replayed a graph.
        recorded: Whether there is a graph now.
        nbytes: Memory that this graph added to what the model's graphs share.
        reason: Why they cannot be recorded; empty if they can, or were not called often enough.
    """

    sizes: tuple[tuple[int, ...], ...]
    calls: int
    replays: int
    recorded: bool
    nbytes: int
    reason: str

    def __str__(self) -> str:
        """Return one line."""
        sizes = _sizes_text(self.sizes)
        if self.recorded:
            return f"{sizes}: a graph of {self.nbytes:,} bytes, replayed {self.replays} times"
        return f"{sizes}: step by step; {self.reason or f'{self.calls} calls'}"


class Replay(Protocol):
    """A graph."""

    @property
    def nbytes(self) -> int:
        """Memory that recording it took."""

    def __call__(self, leaves: Sequence[Tensor]) -> list[Any]:
        """Return the results for tensors of its sizes; the next replay overwrites them."""


class Recorder(Protocol):
    """Records graphs on one device; their memory is shared."""

    @property
    def memory(self) -> int:
        """Bytes of the device."""

    def busy(self) -> bool:
        """Return whether this call must run plainly: someone else records or watches it."""

    def settings(self) -> Hashable:
        """Return what operators depend on besides their arguments."""

    def turn(self) -> AbstractContextManager[None]:
        """Let no other thread or stream replay or record on the device."""

    def warm_up(self, leaves: Sequence[Tensor], run: Run, steps: Run) -> tuple[list[Any], str]:
        """Run as it will be recorded; return the results, and why it cannot be recorded or "".

        What cannot be recorded is seen in ``steps``.
        """

    def record(self, leaves: Sequence[Tensor], run: Run) -> Replay | str:
        """Return a graph for tensors of these sizes, or why there is none. Nothing is computed."""

    def settle(self) -> None:
        """Wait until no replay runs any more, so that graphs may go."""

    def renew(self) -> None:
        """Let later graphs share other memory, so that that of earlier ones goes with them."""

    def fresh(self) -> Recorder:
        """Return one whose graphs share other memory."""


@final
class _Entry:
    """What is known of calls with the same sizes."""

    def __init__(self, sizes: tuple[tuple[int, ...], ...]) -> None:
        self.sizes = sizes
        self.calls = self.replays = self.waited = 0
        self.needed = 2
        self.replay: Replay | None = None
        self.reason = ""

    def row(self) -> GraphRow:
        nbytes = self.replay.nbytes if self.replay else 0
        recorded = self.replay is not None
        return GraphRow(self.sizes, self.calls, self.replays, recorded, nbytes, self.reason)


@final
class GraphCache:
    """Runs calls, and replays those whose sizes were seen before.

    Args:
        options: How graphs are kept.
        recorder: Makes them.
    """

    def __init__(self, options: GraphOptions, recorder: Recorder) -> None:
        self._options = options
        self._recorder = recorder
        self._entries: dict[Hashable, _Entry] = {}  # those not called for longest come first

    def run(self, leaves: Sequence[Tensor], run: Run, finish: Finish, steps: Run) -> list[Any]:
        """Return the outputs of a call.

        Args:
            leaves: Its tensors.
            run: Computes the results.
            finish: Makes outputs of them.
            steps: Computes them operator by operator, where torch shows each to who watches; may
                be ``run`` itself.

        Raises:
            RunError: If a step fails.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        if self._recorder.busy() or not all(leaf.numel() for leaf in leaves):
            return finish(run(leaves))
        with self._recorder.turn():
            entry = self._entry_of(leaves)
            if entry.replay is not None:
                entry.replays += 1
                outputs = finish(entry.replay(leaves))
                return [*map(_copy, outputs)] if self._options.copies else outputs
            entry.waited += 1
            if not entry.reason and entry.waited >= entry.needed:
                return self._record(entry, leaves, run, finish, steps)
        return finish(run(leaves))

    def rows(self) -> tuple[GraphRow, ...]:
        """Return what became of the calls, those with the latest sizes last."""
        return tuple(entry.row() for entry in [*self._entries.values()])

    def fresh(self) -> GraphCache:
        """Return one without graphs."""
        return GraphCache(self._options, self._recorder.fresh())

    def _entry_of(self, leaves: Sequence[Tensor]) -> _Entry:
        sizes = tuple(tuple(leaf.shape) for leaf in leaves)
        key = sizes, self._recorder.settings()
        entry = self._entries.pop(key, None) or _Entry(sizes)
        if len(self._entries) >= max(_REMEMBERED, self._options.most + 1):
            del self._entries[next(k for k, e in self._entries.items() if e.replay is None)]
        self._entries[key] = entry
        entry.calls += 1
        return entry

    def _record(
        self, entry: _Entry, leaves: Sequence[Tensor], run: Run, finish: Finish, steps: Run
    ) -> list[Any]:
        results, reason = self._recorder.warm_up(leaves, run, steps)
        outputs = finish(results)  # If a value is NaN, the next call is recorded.
        made = reason or self._recorder.record(leaves, run)
        if isinstance(made, str):
            _refuse(entry, made)
        else:
            entry.replay = made
            self._limit(entry)
        return outputs

    def _limit(self, newest: _Entry) -> None:
        recorded = [entry for entry in self._entries.values() if entry.replay is not None]
        size = sum(entry.replay.nbytes for entry in recorded if entry.replay)
        most = int(self._recorder.memory * self._options.share)
        if size <= most:
            self._drop(recorded[: -self._options.most])
            return
        if newest.row().nbytes > most or recorded == [newest]:
            _refuse(newest, f"its graph needs {size:,} bytes, and graphs may take {most:,}")
        # Memory that graphs share goes with the last of them.
        self._drop(recorded)
        self._recorder.renew()

    def _drop(self, entries: Sequence[_Entry]) -> None:
        if entries:
            self._recorder.settle()
        for entry in entries:
            # Many sizes that take turns would be recorded over and over, which takes longer.
            entry.replay, entry.waited, entry.needed = None, 0, 2 * entry.needed


def _refuse(entry: _Entry, reason: str) -> None:
    entry.reason = reason
    _LOG.warning("calls with %s run step by step: %s", _sizes_text(entry.sizes), reason)


def _copy(output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else output


def _sizes_text(sizes: Sequence[Sequence[int]]) -> str:
    return " ".join(str(list(size)) for size in sizes)
