"""Calibration data, and the work that is done with what the layers see of it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from fpcompiler.artifact import package_versions
from fpcompiler.calibration.float_graph import raise_without_quantization
from fpcompiler.calibration.gradients import SquaredGradients
from fpcompiler.calibration.groups import Group
from fpcompiler.calibration.preflight import Preflight
from fpcompiler.calibration.statistics import Accumulator, InputStatistics
from fpcompiler.errors import OptionError, RunError, describe_layer
from fpcompiler.ir.printer import print_program
from fpcompiler.ir.program import Program
from fpcompiler.streams import Environment, Result, Results, Segments, Spill

Work = Callable[[Group, InputStatistics], Result]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_LOG: Final = logging.getLogger("fpcompiler.calibration")
_UNITS: Final = {
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
}
_SAMPLE: Final = 1024
_WORTH_TELLING: Final = 2.0
"""Seconds of work from which on a prediction is of use."""
_SHARE: Final = 0.5
"""Of the memory, for statistics; the rest is for one batch on its way and for the work itself."""


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from a text such as ``4GiB`` or ``512 MiB``.

    Raises:
        OptionError: If it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise OptionError(f"{text!r} is no amount of memory; write for instance 4GiB or 512MiB.")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Calibration:
    """Batches of a model's inputs, and how much may be used to learn from them.

    Attributes:
        batches: For each batch the tensors of a call, in the order of the program's arguments.
        max_memory: Bytes that calibration may take beside the weights and the batches.
        sample: Tokens of each layer's input that are kept as they are.
        seed: Decides which.
        device: Where the model runs; by default the GPU if there is one.
        folder: Results and what is needed to go on are kept here, so that a run that was killed
            goes on after the last finished group; by default a temporary folder.
        report: Is told what the work will take, once its first batch has run.
    """

    batches: Sequence[tuple[Tensor, ...]]
    max_memory: int = 4 << 30
    sample: int = _SAMPLE
    seed: int = 0
    device: torch.device = field(default_factory=lambda: _default_device())
    folder: Path | None = None
    report: Callable[[str], None] = _LOG.info

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: If there is no batch, or nothing to work with.
        """
        if not self.batches:
            raise OptionError("the calibration data is empty; give at least one batch.")
        if self.sample < 1 or self.max_memory < 1:
            raise OptionError("calibration needs memory and a sample of at least one token.")

    def visit(
        self,
        program: Program,
        groups: Sequence[Group],
        work: Work,
        *,
        label: str,
        progress: Progress,
    ) -> dict[str, Result]:
        """Do work on the input of each group of layers.

        The original model runs over all batches, piece by piece, each piece with as many groups
        as have room for their statistics.

        Args:
            program: The program, at stage ``quantized``.
            groups: Of :func:`fpcompiler.calibration.input_groups`, in program order.
            work: Is called once for each group with the statistics of its input.
            label: Says what is done: shown beside the progress bar, and part of what a run that
                resumes is recognized by, so it must name the work with all of its options.
            progress: Wraps an iterable for a progress bar.

        Returns:
            What the work returned, by the name of the group.

        Raises:
            NumericsError: If an input holds NaN or infinity; the message names the layer.
        """
        if not groups:
            return {}
        with self.workspace(program, label) as folder:
            return _Run(self, folder, program, groups).all(work, label, progress)

    @contextmanager
    def workspace(self, program: Program, label: str) -> Iterator[Path]:
        """Provide the folder of a work: always the same one for a run that resumes.

        Args:
            program: What is worked on.
            label: As for :meth:`visit`.
        """
        if self.folder is not None:
            yield self.folder / _fingerprint(self, program, label)
            return
        with tempfile.TemporaryDirectory(prefix="fpcompiler-") as folder:
            yield Path(folder)

    @contextmanager
    def squared_gradients(
        self, program: Program, *, label: str, progress: Progress
    ) -> Iterator[SquaredGradients]:
        """Provide the squared gradients at the outputs of the layers, on the sampled tokens.

        They are computed when this is entered; a run that was killed goes on after its last batch.

        Args:
            program: The program, at stage ``quantized``.
            label: As for :meth:`visit`.
            progress: Wraps an iterable for a progress bar.

        Raises:
            RunError: If the model cannot run on a batch, or has no derivative.
        """
        with self.workspace(program, label) as folder:
            batches = range(len(self.batches))
            found = SquaredGradients(
                program, folder / "gradients", self.batches, [self.quota(b) for b in batches],
                self.seed, self.device,
            )  # fmt: skip
            for batch in progress(batches, len(batches), "gradients"):
                found.compute(batch)
            yield found

    def quota(self, batch: int) -> int:
        """Return how many tokens of a batch go into the sample: equal parts, up to one token."""
        count = len(self.batches)
        return (batch + 1) * self.sample // count - batch * self.sample // count


class _Run:
    def __init__(
        self, calibration: Calibration, folder: Path, program: Program, groups: Sequence[Group]
    ) -> None:
        self.calibration = calibration
        self.spill = Spill(folder / "values")
        self.results = Results(folder / "results")
        self.pieces = _pieces(calibration, groups)
        taps = [group.x for piece in self.pieces for group in piece]
        self.module, nodes = raise_without_quantization(program, taps)
        names = (group.name for piece in self.pieces for group in piece)
        self.nodes = dict(zip(names, nodes, strict=True))
        tapped = [[self.nodes[group.name] for group in piece] for piece in self.pieces]
        self.segments = Segments(self.module, tapped, calibration.device)
        self.told = False

    def all(self, work: Work, label: str, progress: Progress) -> dict[str, Result]:
        done = self._finished()
        steps = self._steps(work, label, done)
        count = (len(self.pieces) - done) * len(self.calibration.batches) + sum(
            len(self._missing(piece)) for piece in self.pieces[done:]
        )
        if done:
            _LOG.info("%s: going on after piece %d of %d", label, done, len(self.pieces))
        for _ in progress(steps, count, label.partition("{")[0]):
            pass
        return {
            group.name: self.results.read(group.name) for piece in self.pieces for group in piece
        }

    def _finished(self) -> int:
        """Return how many pieces need not be done again."""
        done = 0
        for number, piece in enumerate(self.pieces):
            if not self._missing(piece):
                done = number + 1
        return done

    def _missing(self, piece: Sequence[Group]) -> list[Group]:
        return [group for group in piece if not self.results.has(group.name)]

    def _steps(self, work: Work, label: str, done: int) -> Iterator[None]:
        """Do what is missing, yielding after each batch and after each group."""
        self.spill.forget_all_but(done - 1)
        for number in range(done, len(self.pieces)):
            piece = self._missing(self.pieces[number])
            accumulators = self._accumulators(piece)
            for batch in range(len(self.calibration.batches)):
                start = time.perf_counter()
                self._run_batch(number, batch, accumulators)
                if number == done and batch == 0:
                    self._report(label, accumulators, time.perf_counter() - start)
                yield
            for group in piece:
                start = time.perf_counter()
                self.results.write(group.name, work(group, accumulators.pop(group.name).result()))
                self._report_work(label, group, time.perf_counter() - start)
                yield
            if number:
                self.spill.forget(number - 1)

    def _report(self, label: str, accumulators: Mapping[str, Accumulator], seconds: float) -> None:
        tokens = max(accumulator.tokens for accumulator in accumulators.values())
        calibration = self.calibration
        predicted = Preflight.predict(
            self.pieces, len(calibration.batches), calibration.sample, tokens, seconds
        )
        calibration.report(f"{label.partition('{')[0]}: {predicted}")

    def _report_work(self, label: str, group: Group, seconds: float) -> None:
        """Say what the rest of the work will take, after the first group, if it will take long."""
        missing = [group for piece in self.pieces for group in self._missing(piece)]
        if self.told or not missing:
            return
        self.told = True
        if Preflight.work_seconds([group, *missing], seconds) >= _WORTH_TELLING:
            text = Preflight.of_work([group, *missing], seconds)
            self.calibration.report(f"{label.partition('{')[0]}: {text}")

    def _accumulators(self, piece: Sequence[Group]) -> dict[str, Accumulator]:
        settings = (self.calibration.seed, self.calibration.device)
        return {group.name: Accumulator(group.k, *settings) for group in piece}

    def _run_batch(self, number: int, batch: int, accumulators: Mapping[str, Accumulator]) -> None:
        taps: dict[fx.Node, Callable[[Tensor], None]] = {}
        for name, accumulator in accumulators.items():
            tap = partial(
                accumulator.add, batch=batch, quota=self.calibration.quota(batch), name=name
            )
            _chain(taps, self.nodes[name], tap)
        try:
            left = self.segments.run(number, self._environment(number, batch), taps)
        except RunError as error:
            error.add_note(f"in calibration batch {batch + 1}")
            raise
        if number + 1 < len(self.pieces):
            self.spill.write(number, batch, left)

    def _environment(self, number: int, batch: int) -> Environment:
        device = self.calibration.device
        if number:
            return self.spill.read(number - 1, batch, device)
        placeholders = [node.name for node in self.module.graph.nodes if node.op == "placeholder"]
        tensors = self.calibration.batches[batch]
        return {name: tensor.to(device) for name, tensor in zip(placeholders, tensors, strict=True)}


def _chain(
    taps: dict[fx.Node, Callable[[Tensor], None]], node: fx.Node, tap: Callable[[Tensor], None]
) -> None:
    """Add a tap to a node that may have one already: layers of two formats can share a value."""
    before = taps.get(node)
    if before is None:
        taps[node] = tap
        return

    def both(x: Tensor) -> None:
        before(x)
        tap(x)

    taps[node] = both


def _pieces(calibration: Calibration, groups: Sequence[Group]) -> list[list[Group]]:
    """Cut the groups into pieces whose statistics have room in memory together."""
    room = calibration.max_memory * _SHARE
    pieces: list[list[Group]] = []
    used = 0.0
    for group in groups:
        need = Accumulator.bytes(group.k, calibration.sample)
        if need > calibration.max_memory:
            calibration.report(
                f"{describe_layer(group.name)}: the statistics of its {group.k} inputs take "
                f"{-(-need // 2**20)} MiB, more than max_memory, and cannot be split."
            )
        if not pieces or used + need > room:
            pieces.append([])
            used = 0.0
        pieces[-1].append(group)
        used += need
    return pieces


def _fingerprint(calibration: Calibration, program: Program, label: str) -> str:
    """Return what tells one work from another: program, weights, data, options, versions."""
    digest = hashlib.sha256()
    settings = [label, calibration.max_memory, calibration.sample, calibration.seed]
    settings += [str(calibration.device), *sorted(package_versions().items())]
    digest.update(json.dumps(settings).encode())
    # Without places: an empty line in the user's file changes nothing.
    digest.update(print_program(program, locations=False).encode())
    for name in sorted(program.weights):
        digest.update(name.encode())
        _update(digest, program.weights[name])
    for batch in calibration.batches:
        for tensor in batch:
            _update(digest, tensor)
    return digest.hexdigest()[:24]


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
