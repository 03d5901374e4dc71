"""``fpcompiler opt``: run a pipeline on a dumped program."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import Row, print_table, progress
from fpcompiler.cli.tensors import read_inputs, read_tensors
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    import torch

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="a dumped .mlir file, or - for stdin")
    parser.add_argument("-p", "--pipeline", metavar="TEXT", help="the pipeline, as a dump has it")
    parser.add_argument("-o", "--output", metavar="FILE", help="the result; by default stdout")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="values of the program's globals by name (.safetensors or .npz), for passes that "
        "read them; by default those that the dumps of the folder hold (compile --dump-weights)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        nargs="+",
        help="inputs of the program (.safetensors or .npz), a call each, for passes that learn "
        "from data: tensors 0, 1, ... in the order of the arguments of @main",
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
        result = _opt(text, args)
    if args.output:
        Path(args.output).write_text(result, encoding="utf-8")
    else:
        sys.stdout.write(result)
    return OK


def _opt(text: str, args: argparse.Namespace) -> str:
    from fpcompiler import passes
    from fpcompiler.calibration import Calibration
    from fpcompiler.ir.weights import Weights

    values = {}
    if args.weights:
        values = read_tensors(args.weights)
    elif args.file != "-":
        values = passes.weights_beside(Path(args.file))
    calibration = None
    if args.calibration:
        calibration = Calibration([_batch(file) for file in args.calibration])
    return passes.opt(text, args.pipeline, Weights(values), calibration)


def _batch(file: str) -> tuple[torch.Tensor, ...]:
    inputs = read_inputs(file)
    if inputs.kwargs:
        raise OptionError(
            f"{file}: a dump knows its inputs by their order, not by names such as "
            f"{next(iter(inputs.kwargs))!r}; name the tensors 0, 1, ... in the order of @main."
        )
    return inputs.args


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
    "  fpcompiler opt dumps/04-insert-quantize.mlir -p 'gptq,quantize-weights' "
    "--calibration batch.npz\n"
    "  fpcompiler opt --list-passes",
    _add_arguments,
    _run,
)
