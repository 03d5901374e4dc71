"""``fpcompiler import``: from a quantized checkpoint to an artifact."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import print_json, progress
from fpcompiler.cli.tensors import read_inputs
from fpcompiler.errors import OptionError

__all__ = ["COMMAND"]

_EXAMPLE: Final = """\
  fpcompiler import ./Llama-NVFP4 -o llama.fpc
  fpcompiler import ./Llama-NVFP4 --original ./Llama -o llama.fpc   # compares each weight"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", help="a checkpoint: compressed-tensors, or ModelOpt's NVFP4"
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the artifact")
    parser.add_argument(
        "--original",
        metavar="FOLDER",
        help="the model before it was quantized; each weight is compared with it",
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="leave inputs of layers in high precision"
    )
    parser.add_argument(
        "--no-check-values",
        action="store_true",
        help="take weights that no model has, such as with scales that look like reciprocals",
    )
    parser.add_argument("--inputs", metavar="FILE", help="the example call as .safetensors or .npz")
    parser.add_argument("--target", default="cpu", help="what it runs on; by default cpu")
    parser.add_argument("--dump-dir", metavar="DIR", help="write the program after each pass there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    if not Path(args.output).absolute().parent.is_dir():
        raise OptionError(f"the folder of {args.output} does not exist.")
    if Path(args.output).is_dir():
        raise OptionError(f"{args.output} is a folder; give the name of a file.")
    from fpcompiler.importing import import_checkpoint

    inputs = read_inputs(args.inputs) if args.inputs else None
    with progress("importing") as track, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = import_checkpoint(
            args.folder,
            example_inputs=inputs.args if inputs else None,
            example_kwargs=dict(inputs.kwargs) if inputs else None,
            original=args.original,
            weights_only=args.weights_only,
            check_values=not args.no_check_values,
            target=args.target,
            dump_dir=args.dump_dir,
            progress=track,
        )
    for warning in caught:
        if warning.category is UserWarning:
            print(f"warning: {warning.message}", file=sys.stderr)
    compiled.save(args.output)
    plan, size = compiled.plan(), Path(args.output).stat().st_size
    quantized = sum(row.quantized for row in plan.rows)
    if args.json:
        print_json({"artifact": args.output, "bytes": size, **plan.to_json()})
        return OK
    from fpcompiler.runtime.tables import size_text

    print(f"{args.output}: {size_text(size)}")
    print(f"scheme: {compiled.scheme}")
    print(f"layers: {quantized} of {len(plan.rows)} quantized, as they are in the checkpoint")
    return OK


COMMAND: Final = Command(
    "import", "compile a model that is quantized already", _EXAMPLE, _add_arguments, _run
)
