"""``fpcompiler convert``: between artifacts and checkpoints, without loss."""

from __future__ import annotations

import argparse
from typing import Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import print_json, progress

__all__ = ["COMMAND"]

_EXAMPLE: Final = """\
  fpcompiler convert llama.fpc ./Llama-NVFP4 --model ./Llama
  fpcompiler convert ./Llama-NVFP4 llama.fpc"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="an artifact, or a checkpoint's folder")
    parser.add_argument(
        "target", metavar="TARGET", help="FILE.fpc, or a new folder: compressed-tensors"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="to write a checkpoint: the original model's folder"
    )
    parser.add_argument(
        "--no-check-values", action="store_true", help="take weights that no model has"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler.importing import convert

    with progress("converting"):
        done = convert(
            args.source, args.target, model=args.model, check_values=not args.no_check_values
        )
    if args.json:
        print_json({"written": str(done.path), "layers": done.layers, "bytes": done.bytes})
        return OK
    print(f"{done.path}: {done.layers} quantized layers, {done.bytes:,} bytes, all values equal")
    return OK


COMMAND: Final = Command(
    "convert",
    "turn artifacts into checkpoints and back, without loss",
    _EXAMPLE,
    _add_arguments,
    _run,
)
