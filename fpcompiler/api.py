"""``fpcompiler.compile`` and ``fpcompiler.load``: the only code that knows the whole way.

Loading needs no compiler, so everything that does is imported inside of ``compile``.
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
from fpcompiler.errors import CaptureError, OptionError
from fpcompiler.options import Options
from fpcompiler.plan import Plan
from fpcompiler.runtime.golden import record_golden
from fpcompiler.runtime.inputs import bind
from fpcompiler.runtime.loading import load as load
from fpcompiler.runtime.model import COMPILING, CompiledModel
from fpcompiler.runtime.strict import require_library
from fpcompiler.runtime.tables import PlanTable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from fpcompiler.calibration import Calibration
    from fpcompiler.capture import CapturedProgram
    from fpcompiler.passes import PassResult, Pipeline
    from fpcompiler.scheme import Scheme

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_NONE = type(None)


def compile(
    model: nn.Module | ExportedProgram,
    scheme: Scheme | str | Mapping[str, Any] | os.PathLike[str] = "w4a6",
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    target: str | Sequence[str] = "cpu",
    dynamic: Any = "auto",
    clip: str = "max",
    method: str = "rtn",
    attention: str | None = None,
    effective_bits: float | None = None,
    round_budget: str | None = None,
    max_memory: str | int = "4GiB",
    work_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    pipeline: str | Pipeline | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
    dump_weights: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a model.

    With example inputs or calibration data (or an ExportedProgram) the model is compiled at once;
    without, on the first call, for the inputs of that call. The model itself is not changed; the
    layers that stay in high precision share its weights, so do not change these in place.

    Args:
        model: Any module that ``torch.export.export`` accepts, Hugging Face models included, or an
            ExportedProgram.
        scheme: Which formats the layers get: a name (``"w4a6"``), the exact text of a scheme, a
            recipe (a mapping, or the path of a YAML or JSON file), or a Scheme.
        example_inputs: Positional arguments of an example call.
        example_kwargs: Keyword arguments of an example call.
        calibration: Batches: each a tensor, a tuple of arguments or a dict of keyword arguments;
            all are held in memory. Methods other than rounding to nearest learn from them. Without
            example inputs the first one is the example call.
        target: What the program runs on, see ``fpcompiler targets``; several as a list or with
            commas. GPUs (``"sm_100a"``) get kernels beside the plan, which needs nvcc and the extra
            ``cuda``, but no GPU.
        dynamic: Which sizes may vary, see :func:`fpcompiler.capture.capture`; ``"auto"``: batch and
            sequence lengths, where the model allows it.
        method: How formats, scales and roundings are found, a name in
            :data:`fpcompiler.passes.METHODS`: ``"rtn"`` rounds to nearest and needs no data.
        attention: What of attention is quantized, by default nothing. An operand such as
            ``"f8E4M3FN@token:f32"`` is that of queries, keys and values;
            ``"qkv=OPERAND,weights=OPERAND,cache=OPERAND"``, or some of these parts, also names the
            weights after softmax and the stored cache of models that keep keys and values in
            buffers.
        effective_bits: Bits for each quantized weight, scales included: some layers get wider or
            narrower weights than the scheme says, where that is predicted to do least damage to the
            model's output on the calibration data. :attr:`CompiledModel.reports` has the table.
        round_budget: About what the methods that learn roundings may take for that, such as
            ``"5min"``: they then make fewer steps, as many as this machine can. Without it,
            ``adaround`` makes 2,500 steps for each block.
        max_memory: What calibration may take beside the model and the batches: ``"4GiB"``.
        work_dir: A folder for what calibration has finished, so that a run that was killed goes on
            from there; the result is the same, unless ``round_budget`` was given. A finished run
            leaves less than the artifact there, a killed one what it needs to go on; delete the
            folder when no run uses it.
        seed: Of every random choice in calibration.
        pipeline: Passes to run instead of those that the scheme and the target ask for.
        dump_dir: A folder that gets the program after each pass, what the pass changed, and what
            it did to the numbers.
        dump_weights: Whether the values of the weights are written there too, so that
            ``fpcompiler opt`` can run any pass on any dump.
        strict: Whether it is an error if a layer would run here without the kernels of the target,
            more slowly; see :func:`load`. Layers that stay in high precision are none.
        clip: How row scales of weights are chosen: ``"max"`` maps the largest magnitude to the
            largest code, ``"mse"`` searches the clip with the least squared error.
        progress: Wraps an iterable of long work for a progress bar: ``progress(items, n, label)``.
            By default a bar on stderr, if that is a terminal (see ``FPC_PROGRESS``).

    Raises:
        FormatError: If the scheme or an operand means nothing.
        OptionError: If an option has an unusable value.
        TargetError: If the target is unknown, or cannot run a layer, or a kernel does not compile;
            with ``strict``, also if a layer would run without its kernels.
        DependencyError: If what compiles kernels for a target is not installed.
        CaptureError: If torch.export cannot turn the model into a graph.
        NumericsError: If a weight holds NaN or infinity; the message names the layer.
    """
    from fpcompiler.passes import METHODS, default_pipeline, parse_pipeline, what_learns
    from fpcompiler.scheme import Scheme as SchemeClass

    require_type("target", target, (str, tuple, list), "the name of a target, such as 'cpu'")
    require_type("method", method, (str,), "the name of a method, such as 'gptq'")
    require_type("attention", attention, (str, _NONE), "an operand such as 'f8E4M3FN@token:f32'")
    require_type("effective_bits", effective_bits, (int, float, _NONE), "a number such as 4.5")
    require_type("round_budget", round_budget, (str, _NONE), "a length of time such as '5min'")
    require_type("pipeline", pipeline, (str, tuple, list, _NONE), "a text or a tuple of passes")
    require_type("dump_dir", dump_dir, (*PATH, _NONE), "a folder, such as 'dumps'")
    parsed = SchemeClass.of(scheme)
    plan_target, archs = _require_targets(target, strict)
    # What is wrong with the passes is said before a model is captured.
    given = (method, attention, effective_bits, round_budget)
    if pipeline is not None and given != ("rtn", None, None, None):
        raise OptionError(
            "pipeline= names all passes; leave out method=, attention=, effective_bits= and "
            "round_budget=."
        )
    if pipeline is None:
        learner = what_learns(method, effective_bits)
        if learner and calibration is None:
            raise OptionError(
                f"{learner} learns from data: give calibration=batches, such as [x, y] "
                "(--calibration on the command line)."
            )
        pipeline = default_pipeline(
            str(parsed), plan_target, clip, method, attention, effective_bits, round_budget or ""
        )
        chosen = {"method": method, "attention": attention, "effective_bits": effective_bits}
    else:
        chosen = {}
    passes = parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    data = None
    if calibration is not None:
        data = _Data(calibration, max_memory, work_dir, seed)
        least = METHODS[method].least_batches if method in METHODS else 0
        if len(data.calls) < least:
            raise OptionError(
                f"the method {method} needs at least {least} batches of calibration data, since "
                "one is not learned from and decides. Split the data into more batches."
            )
    dumps, bar = Dumps.of(dump_dir, weights=dump_weights), progress or _progress()
    if dump_weights and dumps.folder is None:
        raise OptionError("dump_weights= needs a folder: give dump_dir= too, or FPC_DUMP.")
    targets = _Targets(plan_target, archs)
    job = _Job(model, parsed, targets, dynamic, passes, dumps, bar, data, chosen)
    example = _example(example_inputs, example_kwargs, data)
    if example is None and isinstance(model, nn.Module):
        return CompiledModel.deferred(
            job.build, scheme=str(parsed), dumps=dumps.folder, strict=strict
        )
    # An ExportedProgram brings its own example call, unless it was saved without.
    args, kwargs = example or getattr(model, "example_inputs", None) or ((), {})
    try:
        return CompiledModel(job.build(args, kwargs), dumps=dumps.folder, strict=strict)
    except CaptureError as error:
        if example_inputs is None and example_kwargs is None and data is not None:
            error.add_note(
                "the example inputs are calibration batch 1; example_inputs= gives others"
            )
        raise


def _require_targets(target: str | Sequence[str], strict: bool) -> tuple[str, tuple[str, ...]]:
    """Return the target of the plan and those that get kernels; all that needs is there."""
    from fpcompiler.codegen.package import require_tools
    from fpcompiler.codegen.targets import split_targets

    plan_target, archs = split_targets(target)
    if archs:
        require_tools(Options.from_env())
    if strict:
        require_library(plan_target)
    return plan_target, archs


@dataclass(frozen=True)
class _Targets:
    """What the plan is for, and the GPUs that get kernels beside it."""

    plan: str
    archs: tuple[str, ...]


class _Data:
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
        require_type("work_dir", work_dir, (*PATH, _NONE), "a folder, such as 'work'")
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


class _Job:
    """One compilation, ready to run as soon as there is an example call."""

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        scheme: Scheme,
        targets: _Targets,
        dynamic: Any,
        pipeline: Pipeline,
        dumps: Dumps,
        progress: Progress,
        data: _Data | None,
        chosen: Mapping[str, Any],
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

    def build(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Artifact:
        """Capture the model with an example call and compile it, one model at a time."""
        with COMPILING:
            return self._build(args, kwargs)

    def _build(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Artifact:
        from fpcompiler import ir, passes
        from fpcompiler.codegen.emit_plan import emit_plan
        from fpcompiler.passes.layers import name_layers

        captured = self._capture(args, kwargs)
        program = ir.import_program(captured.exported)
        name_layers(program)
        pipeline = self.pipeline
        batch = _flat_inputs(captured, args, kwargs)
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
        )
        plan, tensors = emit_plan(
            program, captured.signature, captured.placeholders, captured.symbols
        )
        self._warn_unmatched(plan)
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
            kernels=self._kernels(plan, tensors, golden),
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


def _progress() -> Progress:
    if not Options.from_env().shows_progress(sys.stderr):
        return lambda items, total, label: items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items, total, label: track(items, label, total, console=console, transient=True)


def _example(
    inputs: tuple[Any, ...] | Tensor | None, kwargs: Mapping[str, Any] | None, data: _Data | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """Return the example call, from the examples or from the first calibration batch."""
    wanted = "a tensor, or a tuple of positional arguments such as (x,)"
    require_type("example_inputs", inputs, (Tensor, tuple, list, _NONE), wanted)
    wanted = "a dict of keyword arguments, such as {'x': x}"
    require_type("example_kwargs", kwargs, (Mapping, _NONE), wanted)
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
