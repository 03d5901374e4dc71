"""``fpcompiler bench``: how fast an artifact runs, where the time goes, what the machine allows."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import OK, STRICT_HELP, TRUST_HELP, Command
from fpcompiler.cli.model import ONNX
from fpcompiler.cli.output import print_json, print_rich, progress
from fpcompiler.cli.tensors import read_inputs
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from fpcompiler.artifact import Artifact
    from fpcompiler.runtime.profile_report import Profile

__all__ = ["COMMAND"]

_STDOUT: Final = "-"

_EXAMPLE: Final = """\
  fpcompiler bench model.fpc
  fpcompiler bench model.fpc --inputs in.safetensors --threads 2 --trace trace.json
  fpcompiler bench model.fpc --size batch=1 --size length=512 --json result.json

Without --inputs the recorded call is run, with --size for the sizes that shall differ;
`fpcompiler inspect` shows their names. --trace writes a file for chrome://tracing or
ui.perfetto.dev."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an artifact")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--inputs", metavar="FILE", help="the call as .safetensors or .npz")
    inputs.add_argument(
        "--size", metavar="NAME=N", action="append", default=[], type=_size,
        help="a size of the recorded call that shall differ; may be repeated",
    )  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=2.0, help="how long; by default 2")
    length.add_argument("--iterations", type=int, metavar="N", help="how many calls instead")
    parser.add_argument("--device", default="cpu", help="by default cpu")
    parser.add_argument("--strict", action="store_true", help=STRICT_HELP)
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of the CPU")
    parser.add_argument(
        "--top", type=_positive, default=15, metavar="N", help="rows of the tables; by default 15"
    )
    parser.add_argument("--trace", metavar="FILE", help="write the steps as a Chrome trace")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const=_STDOUT,
        help="write JSON to a file; without one, print it instead of the tables",
    )  # fmt: skip


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=N, such as length=512")
    return name, int(size)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    for name in (args.trace, args.json):  # Before the work, not after it.
        if name not in (None, _STDOUT) and not Path(name).parent.is_dir():
            raise OptionError(f"the folder of {name} does not exist.")
    if args.file.endswith(ONNX):
        raise OptionError(
            f"bench measures artifacts, and {args.file} is an ONNX file. Give the artifact that it "
            "was exported from, or measure the file with onnxruntime's own tools."
        )
    with progress("measuring"), _threads(args.threads):
        result = _measure(args)
    if args.trace:
        _write(args.trace, result.trace())
    data = {"file": args.file, **result.to_json()}
    if args.json == _STDOUT:
        print_json(data)
        return OK
    if args.json:
        _write(args.json, data)
    for table in result.tables(args.top):
        print_rich(table)
    return OK


def _measure(args: argparse.Namespace) -> Profile:
    from fpcompiler import artifact as artifacts
    from fpcompiler.runtime.inputs import named
    from fpcompiler.runtime.memory import resident_bytes
    from fpcompiler.runtime.model import CompiledModel

    before = resident_bytes()
    artifact = artifacts.read(args.file)
    model = CompiledModel(artifact, device=args.device, strict=args.strict, trust=args.trust)
    after = resident_bytes()
    batch = named(artifact.plan.signature, _leaves(artifact, args))
    result = model.profile(batch, seconds=args.seconds, iterations=args.iterations)
    if before is None or after is None:
        return result
    return replace(result, memory=replace(result.memory, loading=after - before))


def _leaves(artifact: Artifact, args: argparse.Namespace) -> list[Tensor]:
    from fpcompiler.runtime.example_call import example_call
    from fpcompiler.runtime.inputs import bind

    if not args.inputs:
        return example_call(artifact.plan, artifact.golden, dict(args.size))
    inputs = read_inputs(args.inputs)
    return bind(artifact.plan.signature, inputs.args, inputs.kwargs)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch and the native library use so many threads while the block runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(path: str, data: Any) -> None:
    Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")


COMMAND: Final = Command(
    "bench",
    "measure an artifact: speed, memory, time per operator, and what the machine allows",
    _EXAMPLE,
    _add_arguments,
    _run,
)
