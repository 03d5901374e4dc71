"""The compiled model: what ``fpcompiler.compile`` and ``fpcompiler.load`` return."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

import torch
from torch import nn

from fpcompiler.artifact import Artifact, save
from fpcompiler.errors import OptionError, RunError
from fpcompiler.options import Options
from fpcompiler.runtime.compare import Batch, call_arguments, compare
from fpcompiler.runtime.cuda.capture import CudaRecorder
from fpcompiler.runtime.cuda.graphs import GraphCache, GraphOptions, GraphRow
from fpcompiler.runtime.cuda.kernels import CudaKernels, load_kernels
from fpcompiler.runtime.devices import parse_device
from fpcompiler.runtime.example_call import example_call
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.explain import TOKENS, ExplainTable, explain
from fpcompiler.runtime.inputs import bind
from fpcompiler.runtime.profile import profile
from fpcompiler.runtime.profile_report import Profile
from fpcompiler.runtime.reproducible import warn_of_inexact_layers
from fpcompiler.runtime.strict import require_kernels
from fpcompiler.runtime.tables import CompareTable, PlanTable, VerifyReport
from fpcompiler.runtime.trust import Gatekeeper
from fpcompiler.runtime.verify import verify

if TYPE_CHECKING:
    from fpcompiler.interop.formats import Exported

Build: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], Artifact]
"""Captures and compiles a model for the arguments of a call."""

COMPILING: Final = threading.RLock()
"""Held while a model is compiled: torch.export changes state that all threads share."""


@final
class CompiledModel:
    """A compiled model; call it like the model it was compiled from.

    Args:
        artifact: What to run.
        device: Where to run it.
        dumps: The folder with the dumps of the compilation, or None.
        source: The file that the artifact was read from, or None.
        strict: Whether layers that would run without the kernels of their target are an error.
        trust: Whether compiled kernels of the artifact are loaded as they are; see
            :func:`fpcompiler.load`.
        kernels: Whether they are used at all.
        graphs: Whether calls are recorded as CUDA graphs; see :func:`fpcompiler.load`.
        reproducible: Whether operators of torch have the same result on every machine; see
            :func:`fpcompiler.load`.

    Raises:
        OptionError: If graphs are asked for on a device that has none.
        TargetError: If there are such layers, or the artifact has kernels for other GPUs only.
        ArtifactError: If its kernels are not trusted and cannot be built again.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        device: str | torch.device = "cpu",
        dumps: Path | None = None,
        source: Path | None = None,
        strict: bool = False,
        trust: bool = False,
        kernels: bool = True,
        graphs: bool | GraphOptions | None = None,
        reproducible: bool = False,
    ) -> None:
        self._artifact: Artifact | None = artifact
        self._executor: Executor | None = None
        self._build: Build | None = None
        self._scheme = artifact.scheme
        self._device = parse_device(device)
        self._source = source
        self._strict, self._trust, self._use_kernels = strict, trust, kernels
        self._use_graphs = _checked_graphs(graphs, self._device)
        self._compiles_rest, self._reproducible = False, reproducible
        self.dumps = dumps
        self._ready()

    @classmethod
    def deferred(
        cls,
        build: Build,
        *,
        scheme: str = "",
        device: str | torch.device = "cpu",
        dumps: Path | None = None,
        strict: bool = False,
    ) -> CompiledModel:
        """Return a model that is captured and compiled by its first call.

        Args:
            build: Called once, with the arguments of that call.
            scheme: Exact text of the scheme.
            device: Where to run.
            dumps: The folder that will hold the dumps, or None.
            strict: As for the class; the first call raises.
        """
        model = cls.__new__(cls)
        model._artifact, model._executor, model._build = None, None, build
        model._scheme, model._device, model._source = scheme, parse_device(device), None
        model._strict, model._trust, model._use_kernels = strict, False, True
        model._use_graphs = None
        model._compiles_rest, model._reproducible, model.dumps = False, False, dumps
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the arguments of its ``forward``.

        Raises:
            RunError: If the arguments do not fit, or a step fails.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        executor = self._executor
        if executor is None:
            executor = self._compile(args, kwargs)
        return executor.run(*args, **kwargs)

    @property
    def scheme(self) -> str:
        """Exact text of the scheme; it parses back to the scheme."""
        return self._scheme

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def artifact(self) -> Artifact:
        """All that :meth:`save` writes.

        Raises:
            RunError: If the model has not been called yet, so that nothing is compiled.
        """
        if self._artifact is None:
            raise RunError(
                "This model is captured by its first call, which has not happened yet. Call it "
                "once, or pass example_inputs to compile()."
            )
        return self._artifact

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file; :func:`fpcompiler.load` reads it without any of its classes.

        The file appears at once and complete, or not at all.

        Raises:
            ArtifactError: If the file cannot be written.
            RunError: If the model has not been called yet.
        """
        save(path, self.artifact)

    def export(self, path: str | os.PathLike[str], format: str, **options: Any) -> Exported:
        """Write the model in the format of another tool, such as ``onnx-portable`` or ``pt2``.

        Args:
            path: The file, or the folder where the format is one.
            format: A name in :data:`fpcompiler.interop.formats.EXPORT_FORMATS`.
            options: Options of the format, such as ``external_data=True``.

        Returns:
            The files, and what there is to know of them.

        Raises:
            OptionError: If there is no such format or option.
            DependencyError: If a package is missing that the format needs.
            ExportError: If the format cannot express the model; the message names the layer.
            RunError: If the model has not been called yet.
        """
        from fpcompiler.interop.formats import export

        return export(self.artifact, path, format, **options)

    def plan(self) -> PlanTable:
        """Return what became of each layer: format, kernel, why, and bytes before and after.

        Raises:
            RunError: If the model has not been called yet.
        """
        return PlanTable.of(self.artifact.plan.layers, self._scheme)

    def explain(self, gpu: str | None = None, tokens: Sequence[int] = TOKENS) -> ExplainTable:
        """Return what each layer is predicted to take on a GPU, and against bf16.

        Nothing is run, and the GPU need not be here.

        Args:
            gpu: On which GPU: ``"sm_90a"``, for which times were measured, or one for which they
                are estimated from its data sheet; by default the first that it was compiled for.
            tokens: For which numbers of tokens, all of a batch.

        Raises:
            OptionError: If there are no predictions for the GPU, or a number is none.
            RunError: If the model has not been called yet.
        """
        return explain(self.artifact, gpu, tokens)

    @property
    def reports(self) -> Mapping[str, str]:
        """What passes reported when the model was compiled, by pass: texts in Markdown.

        Raises:
            RunError: If the model has not been called yet.
        """
        reports: Mapping[str, str] = self.artifact.recipe.get("reports", {})
        return reports

    @property
    def graphs(self) -> tuple[GraphRow, ...]:
        """What became of the calls with the same sizes: a CUDA graph, or why not.

        Empty where calls are not recorded: on the CPU, with ``graphs=False``, and without kernels.
        """
        cache = self._executor.graphs if self._executor else None
        return cache.rows() if cache else ()

    def compare(self, model: nn.Module, batches: Iterable[Batch]) -> CompareTable:
        """Compare with the eager model: SQNR, cosine and largest error per layer and output.

        Args:
            model: The model that was compiled.
            batches: Calls: each a tensor, a tuple of arguments, or a dict of keyword arguments. If
                nothing is compiled yet, the first one is what the model is captured with.

        Raises:
            OptionError: If there are no batches, or one is of another type.
            RunError: If a batch does not fit.
        """
        batches = list(batches)
        if self._artifact is None and batches:
            self._compile(*call_arguments(batches[0]))
        return compare(self._ready(), model, batches)

    def profile(
        self,
        batch: Batch | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        seconds: float = 2.0,
        iterations: int | None = None,
    ) -> Profile:
        """Measure its speed and memory, where the time goes, and what this machine allows.

        The state (KV caches) of this model stays as it is: the calls have one of their own, which
        is reset before each.

        Args:
            batch: The call: a tensor, a tuple of arguments, or a dict of keyword arguments. By
                default the one that was recorded when the model was compiled.
            sizes: Sizes of the recorded call that shall differ, by symbol of the plan:
                ``{"length": 512}``.
            seconds: How long calls are timed.
            iterations: How many calls are timed instead.

        Raises:
            OptionError: If an argument has an unusable value.
            RunError: If nothing is compiled yet, or the batch does not fit.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        plan, executor = self.artifact.plan, self._ready()
        if batch is None:
            leaves = example_call(plan, self.artifact.golden, sizes)
        elif sizes:
            raise OptionError("sizes change the recorded call; leave them out beside a batch.")
        else:
            args, kwargs = call_arguments(batch)
            leaves = bind(plan.signature, args, kwargs)
        leaves = [leaf.to(self._device) for leaf in leaves]
        return profile(executor, leaves, seconds=seconds, iterations=iterations)

    def verify(self) -> VerifyReport:
        """Check the file it came from, its scales and shapes, and replay its recorded calls.

        Raises:
            RunError: If the model has not been called yet.
        """
        return verify(self.artifact, self._ready(), self._source)

    def compile_rest(self) -> None:
        """Let torch.compile compile what lies between the quantized layers, which stay native.

        The next call compiles: that takes seconds to a minute, and a C++ compiler. The first call
        with other sizes compiles once more, for all sizes. ``torch.compile(model)`` does the same
        with options of your own; :meth:`compare`, :meth:`profile` and :meth:`verify` run the
        program as it was.

        Raises:
            OptionError: If the model was loaded with ``reproducible=True``: what is compiled rounds
                less often.
            RunError: At the next call, if torch.compile fails; the message says what to do.
        """
        if self._reproducible:
            raise OptionError(
                "compile_rest() joins operators that reproducible=True keeps apart. Load the model "
                "without reproducible=True, or do not call compile_rest()."
            )
        self._compiles_rest = True
        if self._executor is not None:
            self._executor.compile_rest()

    def reset(self) -> None:
        """Bring the state (KV caches) back to the initial one."""
        if self._executor is not None:
            self._executor.reset()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled; a copy starts from the initial state."""
        return {**self.__dict__, "_executor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the copy ready to run, unless it is still to be captured by its first call."""
        self.__dict__.update(state)
        if self._artifact is not None:
            self._ready()

    def __repr__(self) -> str:
        """Return one line with the scheme, the method and the number of layers."""
        if self._artifact is None:
            return f"CompiledModel({self._scheme!r}, captured by the first call)"
        recipe = self._artifact.recipe
        chosen = [f"{key}={recipe[key]!r}, " for key in ("method", "attention") if recipe.get(key)]
        layers = len(self.plan().rows)
        return f"CompiledModel({self._scheme!r}, {''.join(chosen)}{layers} layers)"

    def _ready(self) -> Executor:
        if self._executor is None:
            artifact = self.artifact
            kernels = self._load_kernels(artifact)
            if self._strict:
                target = kernels.target if kernels else None
                require_kernels(artifact.plan, artifact.tensors, self._device, target)
            if self._reproducible:
                warn_of_inexact_layers(artifact.plan)
            # Kernels have weights in an order of their own: those of the file are read once.
            release = artifact.pages.release
            graphs = self._new_graphs(kernels)
            self._executor = Executor(
                artifact.plan, artifact.tensors, self._device, release, kernels, graphs,
                self._reproducible,
            )  # fmt: skip
            if self._compiles_rest:
                self._executor.compile_rest()
        return self._executor

    def _load_kernels(self, artifact: Artifact) -> CudaKernels | None:
        if self._device.type != "cuda" or not (self._use_kernels and artifact.kernels):
            return None
        options = Options.from_env()
        gatekeeper = Gatekeeper(options, self._trust)
        attention = options.attention and not self._reproducible
        return load_kernels(artifact.kernels, self._device, gatekeeper, attention)

    def _new_graphs(self, kernels: CudaKernels | None) -> GraphCache | None:
        chosen = self._use_graphs
        if chosen is None:
            # The reference looks at values from Python, which no graph can do.
            chosen = kernels is not None and Options.from_env().graphs is not False
        if chosen is False:
            return None
        options = chosen if isinstance(chosen, GraphOptions) else GraphOptions()
        return GraphCache(options, CudaRecorder(self._device))

    def _compile(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Executor:
        if torch.compiler.is_compiling():
            raise RunError(
                "This model is captured by its first call, which cannot happen inside of "
                "torch.compile. Call it once before, or pass example_inputs to compile()."
            )
        with COMPILING:
            if self._build is not None:  # Another thread may have been first.
                self._artifact = self._build(args, kwargs)
                self._scheme = self._artifact.scheme
                self._build = None  # It holds the eager model, which is not needed any more.
            return self._ready()


def _checked_graphs(
    graphs: bool | GraphOptions | None, device: torch.device
) -> bool | GraphOptions | None:
    if graphs and device.type != "cuda":
        raise OptionError(
            f"graphs={graphs!r}: only CUDA devices have graphs, and the model runs on {device}. "
            "Leave it out, or load the model with device='cuda'."
        )
    return graphs
