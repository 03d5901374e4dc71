"""``fpcompiler.compile`` and ``fpcompiler.load``.

Loading needs no compiler, so everything that does is imported inside of ``compile``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fpcompiler.arguments import PATH, require_type
from fpcompiler.dumps import Dumps
from fpcompiler.errors import CaptureError, OptionError
from fpcompiler.job import Data, Job, Progress, Targets, default_progress, example_call
from fpcompiler.options import Options
from fpcompiler.runtime.loading import load as load
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.strict import require_library

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from fpcompiler.passes import Pipeline
    from fpcompiler.scheme import Scheme

_NONE = type(None)
_NOTHING_CHOSEN = ("rtn", None, None, None, False, False, None)


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
    share_scales: bool = False,
    static_inputs: bool = False,
    keep_if_slower: bool | None = None,
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
        share_scales: Whether weights that share an input get one scale of the tensor, a power of
            two, where they have one (NVFP4): servers of checkpoints want that.
        static_inputs: Whether inputs with a scale of the tensor (NVFP4) get it from the calibration
            data, once, and not from each call: servers of checkpoints want that too.
        keep_if_slower: Whether layers stay in 16 bits that are predicted to be slower quantized
            (below 0.95 times the speed of bf16, with the tokens of the example call and, in a model
            with a cache, with one) on each GPU of ``target``. By default they do if ``target``
            names nothing but GPUs on which layers were timed: ``"sm_90a"``. Quantized they take
            less memory all the same; ``False`` quantizes them. ``True`` keeps them whatever else is
            named, on GPUs without measured times by estimates. :meth:`CompiledModel.explain` shows
            what is predicted.
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
    from fpcompiler.codegen.targets import kept_on
    from fpcompiler.passes import METHODS, default_pipeline, parse_pipeline, what_learns
    from fpcompiler.scheme import Scheme as SchemeClass

    require_type("target", target, (str, tuple, list), "the name of a target, such as 'cpu'")
    require_type("method", method, (str,), "the name of a method, such as 'gptq'")
    require_type("attention", attention, (str, _NONE), "an operand such as 'f8E4M3FN@token:f32'")
    require_type("effective_bits", effective_bits, (int, float, _NONE), "a number such as 4.5")
    require_type("round_budget", round_budget, (str, _NONE), "a length of time such as '5min'")
    require_type("keep_if_slower", keep_if_slower, (bool, _NONE), "True, False or None")
    require_type("pipeline", pipeline, (str, tuple, list, _NONE), "a text or a tuple of passes")
    require_type("dump_dir", dump_dir, (*PATH, _NONE), "a folder, such as 'dumps'")
    parsed = SchemeClass.of(scheme)
    plan_target, archs = _require_targets(target, parsed, strict)
    keep_on = kept_on(target, keep_if_slower)
    # What is wrong with the passes is said before a model is captured.
    given = (method, attention, effective_bits, round_budget, share_scales, static_inputs)
    if pipeline is not None and (*given, keep_if_slower) != _NOTHING_CHOSEN:
        raise OptionError(
            "pipeline= names all passes; leave out method=, attention=, effective_bits=, "
            "round_budget=, share_scales=, static_inputs= and keep_if_slower=."
        )
    if pipeline is None:
        learner = what_learns(method, effective_bits, static_inputs)
        if learner and calibration is None:
            raise OptionError(
                f"{learner} learns from data: give calibration=batches, such as [x, y] "
                "(--calibration on the command line)."
            )
        pipeline = default_pipeline(
            str(parsed),
            plan_target,
            clip,
            method,
            attention,
            effective_bits,
            round_budget or "",
            share_scales=share_scales,
            static_inputs=static_inputs,
            keep_on=",".join(keep_on),
        )
        chosen = {"method": method, "attention": attention, "effective_bits": effective_bits}
    else:
        chosen = {}
    passes = parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    data = None
    if calibration is not None:
        data = Data(calibration, max_memory, work_dir, seed)
        least = METHODS[method].least_batches if method in METHODS else 0
        if len(data.calls) < least:
            raise OptionError(
                f"the method {method} needs at least {least} batches of calibration data, since "
                "one is not learned from and decides. Split the data into more batches."
            )
    dumps, bar = Dumps.of(dump_dir, weights=dump_weights), progress or default_progress()
    if dump_weights and dumps.folder is None:
        raise OptionError("dump_weights= needs a folder: give dump_dir= too, or FPC_DUMP.")
    targets = Targets(plan_target, archs)
    job = Job(model, parsed, targets, dynamic, passes, dumps, bar, data, chosen)
    example = example_call(example_inputs, example_kwargs, data)
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


def _require_targets(
    target: str | Sequence[str], scheme: Scheme, strict: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the target of the plan and those that get kernels; all that needs is there."""
    from fpcompiler.codegen.package import require_tools
    from fpcompiler.codegen.targets import split_targets

    plan_target, archs = split_targets(target)
    if archs:
        require_tools(Options.from_env(), scheme, archs)
    if strict:
        require_library(plan_target)
    return plan_target, archs
