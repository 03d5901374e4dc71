"""``fpcompiler compile``: from a model to an artifact."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli import calibration
from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.kernels import kernel_rows
from fpcompiler.cli.output import print_json, progress
from fpcompiler.cli.source import load_source
from fpcompiler.cli.tensors import read_inputs
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    from fpcompiler.runtime.model import CompiledModel

__all__ = ["COMMAND"]

_EXAMPLE: Final = """\
  fpcompiler compile ./my-llama --scheme w4a6 -o my-llama.fpc
  fpcompiler compile model.pt2 --scheme 'w4a6; *.down_proj: w4a8' -o model.fpc
  fpcompiler compile my_package.models:build --recipe recipe.yaml -o model.fpc
  fpcompiler compile ./my-llama --scheme w4a4 --method rotate-gptq --calibration my_data:batches \\
      -o my-llama.fpc

A SOURCE function takes nothing and returns (model, example_inputs)."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .pt2 file, a local Hugging Face folder, or package.module:function",
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the artifact")
    scheme = parser.add_mutually_exclusive_group()
    scheme.add_argument(
        "--scheme", default="w4a6", help="name or exact text of a scheme; by default w4a6"
    )
    scheme.add_argument("--recipe", metavar="FILE", help="the scheme as a .yaml or .json file")
    parser.add_argument("--inputs", metavar="FILE", help="the example call as .safetensors or .npz")
    parser.add_argument(
        "--target",
        default="cpu",
        help="what it runs on, with commas: cpu,sm_100a (see fpcompiler targets); cuda is the GPU "
        "of this machine; by default cpu",
    )
    parser.add_argument(
        "--keep-if-slower",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep layers in 16 bits that are predicted to be slower quantized on each GPU of "
        "--target; by default if that names nothing but GPUs on which layers were timed (sm_90a)",
    )
    parser.add_argument("--dump-dir", metavar="DIR", help="write the program after each pass there")
    parser.add_argument(
        "--dump-weights",
        action="store_true",
        help="write the values of weights there as well, for fpcompiler opt",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    calibration.add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    compiled = _compile(args)
    compiled.save(args.output)
    plan, size = compiled.plan(), Path(args.output).stat().st_size
    _warn_of_rules_without_layers(compiled)
    dumps = str(compiled.dumps) if compiled.dumps else None
    if args.json:
        facts = {"artifact": args.output, "bytes": size, "dumps": dumps}
        print_json({**facts, "reports": dict(compiled.reports), **plan.to_json()})
        return OK
    from fpcompiler.runtime.costs import GPUS
    from fpcompiler.runtime.tables import size_text

    quantized = sum(row.quantized for row in plan.rows)
    print(f"{args.output}: {size_text(size)}")
    print(f"scheme: {compiled.scheme}")
    print(f"layers: {quantized} of {len(plan.rows)} quantized; weights of all: ", end="")
    print(f"{size_text(plan.bytes_before)} -> {size_text(plan.bytes_after)}")
    if plan.caches:
        print(plan.cache_text)
    for gpu, _, layers, gemms, proved, kernel_size in kernel_rows(compiled.artifact.kernels):
        print(f"kernels for {gpu}: {layers} layers, {gemms} GEMMs, proved: {proved}; {kernel_size}")
    for gpu in GPUS:
        if gpu in compiled.artifact.targets:
            print(compiled.explain(gpu).summary)
    if dumps:
        print(f"dumps: {dumps}")
    for text in compiled.reports.values():
        print(f"\n{text}", end="")
    return OK


def _compile(args: argparse.Namespace) -> CompiledModel:
    # What is cheap to check comes first: loading a model and torch takes a while.
    from fpcompiler.codegen.targets import kept_on, split_targets
    from fpcompiler.scheme import Scheme

    scheme = Scheme.from_recipe(args.recipe) if args.recipe else Scheme.of(args.scheme)
    split_targets(args.target)
    kept_on(args.target, args.keep_if_slower)
    if not Path(args.output).absolute().parent.is_dir():
        raise OptionError(f"the folder of {args.output} does not exist.")

    with progress("loading the model"):
        from fpcompiler import api

        inputs = read_inputs(args.inputs) if args.inputs else None
        source = load_source(args.source, inputs)
    with progress("compiling") as track, warnings.catch_warnings():
        # _warn_of_rules_without_layers says it in the words of a command line.
        warnings.filterwarnings("ignore", "The rule .* of the scheme matches no layer")
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        return api.compile(
            source.model,
            scheme,
            example_inputs=source.inputs.args,
            example_kwargs=dict(source.inputs.kwargs),
            calibration=calibration.read_batches(args.calibration),
            method=args.method,
            attention=args.attention,
            effective_bits=args.effective_bits,
            round_budget=args.round_budget,
            share_scales=args.share_scales,
            static_inputs=args.static_inputs,
            keep_if_slower=args.keep_if_slower,
            max_memory=args.max_memory,
            work_dir=args.work_dir,
            seed=args.seed,
            target=args.target,
            dump_dir=args.dump_dir,
            dump_weights=args.dump_weights,
            progress=track,
        )


_OURS: Final = ("The method ", "quantize-cache: ", "keep_if_slower: ")


def _show_warning(
    otherwise: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *where: Any,
) -> None:
    """Print our own warnings as a line: where in our source they come from tells a user nothing."""
    if category is UserWarning and str(message).startswith(_OURS):
        print(f"warning: {message}", file=sys.stderr)
    else:
        otherwise(message, category, *where)


def _warn_of_rules_without_layers(compiled: CompiledModel) -> None:
    from fpcompiler.scheme import Scheme

    roles = {row.name: row.role for row in compiled.plan().rows}
    for pattern in Scheme.parse(compiled.scheme).unmatched_rules(roles):
        print(f"warning: no layer matches the rule for {pattern!r}", file=sys.stderr)


COMMAND: Final = Command(
    "compile", "compile a model and save it as an artifact", _EXAMPLE, _add_arguments, _run
)
