"""``fpcompiler opt``: run a pipeline on a dumped program."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import Row, print_table, progress
from fpcompiler.cli.tensors import read_tensors

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="a dumped .mlir file, or - for stdin")
    parser.add_argument("-p", "--pipeline", metavar="TEXT", help="the pipeline, as a dump has it")
    parser.add_argument("-o", "--output", metavar="FILE", help="the result; by default stdout")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="values of the program's globals by name (.safetensors or .npz), for passes that "
        "read them",
    )
    parser.add_argument("--list-passes", action="store_true", help="list the passes and exit")


def _run(args: argparse.Namespace) -> int:
    if args.list_passes:
        print_table("passes", ("name", "options", "what it does"), _pass_rows())
        return OK
    if args.file is None or args.pipeline is None:
        args.parser.error("it needs FILE and -p PIPELINE, or --list-passes")
    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
    with progress("running the passes"):
        result = _opt(text, args.pipeline, args.weights)
    if args.output:
        Path(args.output).write_text(result, encoding="utf-8")
    else:
        sys.stdout.write(result)
    return OK


def _opt(text: str, pipeline: str, weights: str | None) -> str:
    from fpcompiler import passes
    from fpcompiler.ir.weights import Weights

    return passes.opt(text, pipeline, Weights(read_tensors(weights)) if weights else None)


def _pass_rows() -> list[Row]:
    from fpcompiler import passes

    return [
        (
            name,
            ", ".join(field.name for field in dataclasses.fields(kind)),
            (kind.__doc__ or "").strip().partition("\n")[0],
        )
        for name, kind in passes.PASSES.items()
    ]


COMMAND: Final = Command(
    "opt",
    "run a pipeline on a dumped program, or list the passes",
    "  fpcompiler opt dumps/00-captured.mlir -p 'normalize,cse' -o after.mlir\n"
    "  fpcompiler opt --list-passes",
    _add_arguments,
    _run,
)
