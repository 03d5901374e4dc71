"""One compilation: what was asked for, and the whole way from a model to an artifact.

Nothing of the compiler is imported before a job runs: loading needs none of it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fpcompiler.arguments import PATH, require_type
from fpcompiler.artifact import Artifact, Golden
from fpcompiler.dumps import Dumps
from fpcompiler.errors import OptionError
from fpcompiler.options import Options
from fpcompiler.plan import Plan
from fpcompiler.runtime.golden import record_golden
from fpcompiler.runtime.inputs import bind
from fpcompiler.runtime.model import COMPILING
from fpcompiler.runtime.tables import PlanTable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from fpcompiler.calibration import Calibration
    from fpcompiler.capture import CapturedProgram
    from fpcompiler.passes import PassResult, Pipeline, StoredWeight
    from fpcompiler.scheme import Scheme

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Targets:
    """What the plan is for, and the GPUs that get kernels beside it."""

    plan: str
    archs: tuple[str, ...]


class Data:
    """Calibration data, and how much may be used to learn from it."""

    def __init__(
        self,
        batches: Iterable[Any],
        max_memory: str | int,
        work_dir: str | os.PathLike[str] | None,
        seed: int,
    ) -> None:
        from fpcompiler.calibration import calls, parse_bytes

        self.calls = calls(batches)
        self.max_memory = parse_bytes(max_memory)
        require_type("work_dir", work_dir, (*PATH, type(None)), "a folder, such as 'work'")
        self.folder = None if work_dir is None else _made(Path(work_dir).expanduser())
        self.seed = seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise OptionError(f"seed must be a whole number from 0 to 2**32 - 1, not {seed!r}.")

    def bound(self, captured: CapturedProgram) -> Calibration:
        """Return it as the tensors that the captured program reads."""
        from fpcompiler.calibration import Calibration, bind_calls

        calibration = Calibration(
            bind_calls(captured.signature, captured, self.calls),
            max_memory=self.max_memory,
            seed=self.seed,
            folder=self.folder,
        )
        if not Options.from_env().shows_progress(sys.stderr):
            return calibration
        return replace(calibration, report=lambda text: print(text, file=sys.stderr))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"work_dir: {folder} cannot be made: {error.strerror}.") from error
    return folder


class Job:
    """One compilation, ready to run as soon as there is an example call."""

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        scheme: Scheme,
        targets: Targets,
        dynamic: Any,
        pipeline: Pipeline,
        dumps: Dumps,
        progress: Progress,
        data: Data | None,
        chosen: Mapping[str, Any],
        stored: Mapping[str, StoredWeight] | None = None,
    ) -> None:
        self.model = model
        self.scheme = scheme
        self.targets = targets
        self.dynamic = dynamic
        self.pipeline = pipeline
        self.dumps = dumps
        self.progress = progress
        self.data = data
        self.chosen = chosen
        self.stored = stored

    def build(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Artifact:
        """Capture the model with an example call and compile it, one model at a time."""
        with COMPILING:
            return self._build(args, kwargs)

    def _build(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Artifact:
        from fpcompiler import ir, passes
        from fpcompiler.capture import shapes_of_call
        from fpcompiler.codegen.emit_plan import emit_plan
        from fpcompiler.passes.layers import name_layers

        captured = self._capture(args, kwargs)
        program = ir.import_program(captured.exported)
        name_layers(program)
        pipeline = self.pipeline
        batch = _flat_inputs(captured, args, kwargs)
        if batch is not None and passes.needs_rows(pipeline):
            passes.mark_rows(program, shapes_of_call(captured, batch))
        observers = []
        if self.dumps.folder:
            probe = passes.Probe(program, batch) if batch is not None else None
            observers.append(
                passes.Dumper(
                    self.dumps.folder, program, pipeline, probe, weights=self.dumps.weights
                )
            )
        results = passes.run_pipeline(
            program,
            pipeline,
            observers=observers,
            progress=self.progress,
            calibration=None if self.data is None else self.data.bound(captured),
            stored=self.stored,
        )
        plan, tensors = emit_plan(
            program, captured.signature, captured.placeholders, captured.symbols
        )
        self._warn_unmatched(plan)
        all_kept = passes.all_kept(results)
        if all_kept:
            warnings.warn(all_kept, stacklevel=2)
        else:
            self._warn_of_method(results)
        golden = record_golden(plan, tensors, batch)
        return Artifact(
            plan=plan,
            tensors=tensors,
            scheme=str(self.scheme),
            pipeline=passes.pipeline_text(pipeline),
            targets=(self.targets.plan, *self.targets.archs),
            golden=golden,
            graph=ir.print_program(program),
            kernels={} if all_kept else self._kernels(plan, tensors, golden),
            recipe={
                "scheme": self.scheme.to_recipe(),
                **self.chosen,
                "notes": list(captured.notes),
                "reports": {result.name: result.report for result in results if result.report},
            },
        )

    def _kernels(
        self, plan: Plan, tensors: Mapping[str, Tensor], golden: Sequence[Golden]
    ) -> Mapping[str, bytes]:
        from fpcompiler.codegen.package import package

        if not self.targets.archs:
            return {}
        call = golden[0].inputs if golden else ()
        options = Options.from_env()
        return package(plan, tensors, call, self.targets.archs, options, self.progress)

    def _warn_of_method(self, results: Sequence[PassResult]) -> None:
        from fpcompiler.passes import advice

        method = self.chosen.get("method")
        for line in advice(method, self.scheme, results) if method else ():
            warnings.warn(line, stacklevel=2)

    def _warn_unmatched(self, plan: Plan) -> None:
        layers = PlanTable.of(plan.layers, "").rows
        for rule in self.scheme.unmatched_rules({row.name: row.role for row in layers}):
            warnings.warn(
                f"The rule {str(rule)!r} of the scheme matches no layer; plan() lists their names.",
                stacklevel=2,
            )

    def _capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedProgram:
        from torch.export import ExportedProgram

        from fpcompiler.capture import capture, from_exported

        if isinstance(self.model, ExportedProgram):
            return from_exported(self.model)
        return capture(self.model, args, kwargs, dynamic=self.dynamic)


def default_progress() -> Progress:
    """Return what shows progress by default: a bar on stderr, if that is a terminal."""
    if not Options.from_env().shows_progress(sys.stderr):
        return lambda items, total, label: items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items, total, label: track(items, label, total, console=console, transient=True)


def example_call(
    inputs: tuple[Any, ...] | Tensor | None, kwargs: Mapping[str, Any] | None, data: Data | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """Return the example call, from the examples or from the first calibration batch."""
    wanted = "a tensor, or a tuple of positional arguments such as (x,)"
    require_type("example_inputs", inputs, (Tensor, tuple, list, type(None)), wanted)
    wanted = "a dict of keyword arguments, such as {'x': x}"
    require_type("example_kwargs", kwargs, (Mapping, type(None)), wanted)
    if inputs is not None or kwargs is not None:
        args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
        return args, dict(kwargs or {})
    return None if data is None else data.calls[0]


def _flat_inputs(
    captured: CapturedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...] | None:
    """Return the tensors of the example call in the order of the plan; None if there is none."""
    if not args and not kwargs:
        return None
    return tuple(bind(captured.signature, args, kwargs))
