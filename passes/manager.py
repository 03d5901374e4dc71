"""Runs a pipeline: each pass by MLIR's PassManager, verified, timed, and observed after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch_mlir import ir
from torch_mlir.passmanager import PassManager

from fpcompiler.calibration import Calibration
from fpcompiler.errors import PassError
from fpcompiler.ir.program import Program, Stage, describe_diagnostics
from fpcompiler.passes.base import Pass, PassContext, StoredWeight, pass_text
from fpcompiler.passes.pipeline import Pipeline


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        text: The pass as in a pipeline text.
        seconds: Wall time of the pass itself.
        verify_seconds: Wall time of the verifier after it.
        statistics: What the pass counted; zeros left out.
        report: What it said to people, in Markdown; mostly nothing.
    """

    text: str
    seconds: float
    verify_seconds: float
    statistics: Mapping[str, int] = field(default_factory=dict)
    report: str = ""

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.text.partition("{")[0]


class Observer(Protocol):
    """Is told what happens while a pipeline runs."""

    def before(self, program: Program, item: Pass) -> None:
        """Is called before a pass runs."""

    def after(self, program: Program, item: Pass, result: PassResult) -> None:
        """Is called after a pass has run and its program was verified."""

    def failed(self, program: Program, item: Pass, error: BaseException) -> None:
        """Is called when a pass has failed, the program in the state it was left in."""


Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def run_pipeline(
    program: Program,
    pipeline: Sequence[Pass],
    *,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    stored: Mapping[str, StoredWeight] | None = None,
) -> tuple[PassResult, ...]:
    """Run passes over a program, in place, checking the program after each.

    Raises:
        PassError: If a pass needs another stage than the program will be at; this is checked before
            the first pass runs.
        IRError: If a pass leaves an invalid program.
        Exception: Whatever a pass raises, with a note that names the pass.
    """
    check_stages(program.stage, tuple(pipeline))
    results = []
    for item in pipeline:
        for observer in observers:
            observer.before(program, item)
        try:
            result = _run(program, item, progress, calibration, stored or {})
        except Exception as error:  # a pass of a user can raise anything, and it goes on up
            error.add_note(f"while running the pass {pass_text(item)}")
            for observer in observers:
                observer.failed(program, item, error)
            raise
        results.append(result)
        for observer in observers:
            observer.after(program, item, result)
    return tuple(results)


def check_stages(stage: Stage, pipeline: Pipeline) -> None:
    """Check that each pass finds the stage it needs, before any of them runs.

    Raises:
        PassError: If one does not; the message names the stage it needs.
    """
    for item in pipeline:
        if item.requires is not None and item.requires is not stage:
            raise PassError(
                f"{item.name} needs a program at stage {item.requires.label}, but there it is at "
                f"stage {stage.label}. Put the pass that leads there before it, or leave it out."
            )
        stage = stage if item.ensures is None else item.ensures


def _run(
    program: Program,
    item: Pass,
    progress: Progress | None,
    calibration: Calibration | None,
    stored: Mapping[str, StoredWeight],
) -> PassResult:
    context = PassContext(calibration=calibration, stored=stored)
    if progress is not None:
        context.progress = progress
    manager = PassManager("builtin.module", program.module.context)
    manager.enable_verifier(False)  # timed on its own, below

    def run(operation: ir.Operation, mlir_pass: Any) -> None:
        with program.context():
            item.run(program, context)

    manager.add(run, name=item.name, argument=item.name)
    start = time.perf_counter()
    try:
        manager.run(program.module.operation)
    except ir.MLIRError as error:
        raise PassError(f"{item.name} failed. {describe_diagnostics(error)}") from error
    if item.ensures is not None:
        program.stage = item.ensures
    middle = time.perf_counter()
    program.verify()
    statistics = {what: count for what, count in context.statistics.items() if count}
    seconds = middle - start, time.perf_counter() - middle
    return PassResult(pass_text(item), *seconds, statistics, "\n".join(context.reports))
