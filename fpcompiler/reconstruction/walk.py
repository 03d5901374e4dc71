"""Learns the roundings of a graph's weights, one unit after the other.

Two streams of the calibration data go through the graph: the original model gives the targets of a
unit, and the model whose earlier units are rounded gives its inputs (as in BRECQ, arXiv 2102.05426,
and FP4DiT, arXiv 2503.15465), so that a unit also makes up for the errors before it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from fpcompiler.errors import NumericsError, RunError
from fpcompiler.numerics import pack
from fpcompiler.numerics.adaround import Ended, RoundOptions, SoftWeight, UnitResult, round_unit
from fpcompiler.reconstruction.clock import LEAST, Clock
from fpcompiler.reconstruction.fake_quantize import fake_quantize
from fpcompiler.reconstruction.samples import StoredSamples
from fpcompiler.reconstruction.start import layer_codes
from fpcompiler.reconstruction.stream import Stream
from fpcompiler.reconstruction.subgraph import UnitFunction
from fpcompiler.reconstruction.units import Unit, find_units
from fpcompiler.reconstruction.values import RoundedWeights, Rounding
from fpcompiler.streams import Result, Results, Segments, Spill

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_LOG: Final = logging.getLogger("fpcompiler.reconstruction")
_HELD_OUT: Final = 8
"""One batch of so many decides about results, and is not learned from."""
_SHARE: Final = 0.5
"""Of the memory, for samples; the rest is for a unit and its derivatives."""
_WORTH_TELLING: Final = 2.0
"""Seconds of work from which on a prediction is of use."""


@dataclass(frozen=True)
class Settings:
    """How to walk.

    Attributes:
        options: How roundings are learned; a step takes one batch of calibration data.
        device: Where everything runs.
        quantized_inputs: Whether units are learned with activations quantized.
        max_memory: Bytes, half of which are for samples. A unit takes what it takes.
        seed: Decides which batches are held out, and the order of the others.
        seconds: About what all units may take together; None for no limit.
    """

    options: RoundOptions
    device: torch.device
    quantized_inputs: bool = True
    max_memory: int = 4 << 30
    seed: int = 0
    seconds: float | None = None


class Walk:
    """All units of a graph.

    Args:
        module: The graph with the original weights; activations that are quantized go through
            :func:`.fake_quantize`. Nothing in it may be written to in place before its end.
        rounding: Of each attribute that is a weight to round. Those that are in no unit are rounded
            to nearest.
        batches: Inputs of the graph, at least two.
        folder: Results are kept here, and what is needed to go on.
        settings: How to walk.

    Raises:
        NumericsError: If there are less than two batches.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        rounding: Mapping[str, Rounding],
        batches: Sequence[tuple[Tensor, ...]],
        folder: Path,
        settings: Settings,
    ) -> None:
        if len(batches) < 2:
            raise NumericsError(
                "learning roundings needs at least two batches of calibration data: one is not "
                "learned from and decides. Split the data into more batches."
            )
        self.units = find_units(module.graph, set(rounding))
        self.module = module
        self.batches = batches
        self.rounding = rounding
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        self._inputs = [dict(zip(names, batch, strict=True)) for batch in batches]
        self.settings = settings
        self._results = Results(folder / "results")
        self._weights = RoundedWeights(module, rounding, settings.device)
        skipped = frozenset({fake_quantize})
        self._skipped = frozenset() if settings.quantized_inputs else skipped
        pieces = [[*unit.inputs, *unit.outputs] for unit in self.units]
        settled = partial(Segments, module, pieces, settings.device)
        self._original = Stream(settled(skipped=skipped), folder / "original", self._inputs)
        self._quantized = Stream(
            settled(weights=self._weights, skipped=self._skipped),
            folder / "quantized",
            self._inputs,
        )
        self._samples = Spill(folder / "samples")
        generator = torch.Generator().manual_seed(settings.seed)
        drawn = torch.randperm(len(batches), generator=generator).tolist()
        self._held_out = set(drawn[: max(1, len(batches) // _HELD_OUT)])

    def run(
        self, progress: Progress, label: str, report: Callable[[str], None] = _LOG.info
    ) -> dict[str, Result]:
        """Learn all units that have not been finished in the folder.

        Args:
            progress: Wraps an iterable for a progress bar.
            label: Is shown beside it.
            report: Is told how long it will take, once the first unit is done.

        Returns:
            By the name of the unit: ``codes.I``, packed, of its weight ``I``; ``errors``, the mean
            squared error of the output on the batches held out, rounded to nearest and learned;
            ``kept``, whether the learned codes are better; ``iterations``; and ``ended``, the index
            in ``Ended``.

        Raises:
            NumericsError: If values are not finite.
            RunError: If the model cannot run on a batch.
        """
        done = self._finished()
        self._samples.forget_all()
        if done < len(self.units):
            steps = self._steps(done, label, report)
            for _ in progress(steps, len(self.units) - done, label):
                pass
        for stream in (self._original, self._quantized):
            stream.forget_all()
        return {unit.name: self._results.read(unit.name) for unit in self.units}

    def _finished(self) -> int:
        """Return how many units need not be learned again, and take their codes."""
        for number, unit in enumerate(self.units):
            if not self._results.has(unit.name):
                return number
            self._take(unit, self._results.read(unit.name))
        return len(self.units)

    def _take(self, unit: Unit, result: Result) -> None:
        for index, name in enumerate(unit.weights):
            self._weights.learned(name, result[f"codes.{index}"])

    def _steps(self, done: int, label: str, report: Callable[[str], None]) -> Iterator[None]:
        """Learn the rest of the units, yielding after each."""
        if done:
            _LOG.info("%s: going on after unit %d of %d", label, done, len(self.units))
        self._catch_up(done)
        clock = Clock(self.settings.seconds, [self._size(unit) for unit in self.units[done:]])
        for number in range(done, len(self.units)):
            unit = self.units[number]
            result = self._learn(number, clock)
            self._results.write(unit.name, result)
            self._take(unit, result)
            if number + 1 < len(self.units):
                self._quantized.advance(number)
            self._samples.forget(number)
            for stream in (self._original, self._quantized):
                stream.forget(number - 1)
            clock.done()
            if number == done and clock.left() >= _WORTH_TELLING:
                report(f"{label}: {len(self.units) - done} units: {clock}")
            yield

    def _catch_up(self, done: int) -> None:
        """Bring both streams to where a run that was killed had them."""
        streams = (self._original, self._quantized)
        start = done
        while start and not all(stream.is_at(start) for stream in streams):
            start -= 1
        for number in range(start, done):
            for stream in streams:
                stream.advance(number)
                stream.forget(number - 1)
            self._weights.forget()
        for stream in streams:
            stream.forget_all_but(done - 1)

    def _size(self, unit: Unit) -> int:
        return sum(int(getattr(self.module, name).numel()) for name in unit.weights)

    def _learn(self, number: int, clock: Clock) -> Result:
        try:
            return self._learned(number, clock.allowed())
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"unit {self.units[number].name!r}: there is not enough memory on the device to "
                "learn its roundings. Give the calibration data in smaller batches, or take "
                "round-weights{unit=layer}."
            ) from error

    def _learned(self, number: int, seconds: float | None) -> Result:
        unit, settings, begin = self.units[number], self.settings, time.monotonic()
        function = UnitFunction(self.module, unit, settings.device, self._skipped, self._weights)
        samples, held_out = self._collect(number, function)
        options = replace(settings.options, batch=1, seed=settings.seed, seconds=seconds)
        originals = [self._weights.original(name) for name in unit.weights]
        scales = [self._weights.scales(name) for name in unit.weights]
        soft = [self._soft(*item) for item in zip(unit.weights, originals, scales, strict=True)]
        start = layer_codes(unit, function, originals, scales, soft, (samples, held_out), options)
        if seconds is not None:
            options = replace(options, seconds=max(seconds - (time.monotonic() - begin), LEAST))
        found = round_unit(function, soft, samples, held_out, options, start=start, layer=unit.name)
        return self._encoded(unit, found)

    def _soft(self, name: str, weight: Tensor, scales: tuple[Tensor, ...]) -> SoftWeight:
        rounding, options = self.rounding[name], self.settings.options
        return SoftWeight.of(
            weight, scales, rounding.operand,
            parametrization=options.parametrization, layer=rounding.layer,
        )  # fmt: skip

    def _encoded(self, unit: Unit, found: UnitResult) -> Result:
        result = {
            "errors": torch.tensor([found.nearest_error, found.error], dtype=torch.float64),
            "kept": torch.tensor(found.kept),
            "iterations": torch.tensor(found.iterations),
            "ended": torch.tensor(list(Ended).index(found.ended)),
        }
        for index, (name, codes) in enumerate(zip(unit.weights, found.codes, strict=True)):
            bits = self.rounding[name].operand.format.storage_bits
            result[f"codes.{index}"] = pack(codes, bits).cpu()
        return result

    def _collect(self, number: int, function: UnitFunction) -> tuple[StoredSamples, StoredSamples]:
        """Return what the unit reads in one stream and gives in the other: to learn, and held out.

        The stream of the original model moves on past the unit.
        """
        settings = self.settings
        room = int(settings.max_memory * _SHARE)
        held_out = StoredSamples(self._samples, number, room, settings.device)
        for batch in sorted(self._held_out):
            held_out.add(batch, *self._sample(number, batch, function))
        samples = StoredSamples(self._samples, number, held_out.room, settings.device)
        for batch in range(len(self._inputs)):
            if batch not in self._held_out:
                samples.add(batch, *self._sample(number, batch, function))
        return samples, held_out

    def _sample(self, number: int, batch: int, function: UnitFunction) -> tuple[list[Any], Tensor]:
        unit = self.units[number]
        last = number + 1 == len(self.units)
        targets = self._original.show(number, batch, unit.outputs, keep=not last)
        inputs = self._quantized.show(number, batch, unit.inputs, keep=False)
        return inputs, function.joined(targets)
