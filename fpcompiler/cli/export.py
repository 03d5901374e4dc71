"""``fpcompiler export``: write an artifact in the format of another tool."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import print_json, print_table, progress
from fpcompiler.errors import OptionError
from fpcompiler.interop.formats import EXPORT_FORMATS

if TYPE_CHECKING:
    from fpcompiler.interop.formats import Exported, ExportFormat

__all__ = ["COMMAND"]

_FLAGS: Final = ("external_data", "opset", "model")
"""Arguments that are options of a format."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an artifact")
    parser.add_argument(
        "--format", required=True, metavar="FORMAT", help=f"one of {', '.join(EXPORT_FORMATS)}"
    )
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="where to write")
    parser.add_argument(
        "--external-data", action="store_const", const=True,
        help="onnx: weights in a file of their own, as they are anyway above 2 GB",
    )  # fmt: skip
    parser.add_argument(
        "--opset", type=int, metavar="N",
        help="onnx: the highest opset; types that came later are expressed by earlier ones",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="FOLDER",
        help="compressed-tensors: the original model, for its config, tokenizer and other tensors",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler import artifact as artifacts
    from fpcompiler.interop.formats import export

    options = {name: getattr(args, name) for name in _FLAGS}
    source, target = Path(args.file), Path(args.output)
    if source.exists() and target.exists() and target.samefile(source):
        raise OptionError(f"{args.output} is the artifact itself; give another name with -o.")
    with progress(f"exporting to {args.format}"):
        exported = export(artifacts.read(args.file), args.output, args.format, **options)
    facts = _facts(exported)
    if args.json:
        print_json({**facts, **exported.facts})
        return OK
    rows = [(path, f"{size:,} bytes") for path, size in facts["files"].items()]
    rows += [(name, _text(value)) for name, value in exported.facts.items()]
    print_table(args.format, ("", ""), rows)
    return OK


def _facts(exported: Exported) -> dict[str, Any]:
    return {"files": {str(path): Path(path).stat().st_size for path in exported.files}}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return str(value)


def _example() -> str:
    lines = [
        f"  fpcompiler export model.fpc --format {row.name} --output model{row.suffix}{_rest(row)}"
        for row in EXPORT_FORMATS.values()
    ]
    width = max(len(row.name) for row in EXPORT_FORMATS.values())
    formats = [f"  {row.name:{width}}  {row.summary}" for row in EXPORT_FORMATS.values()]
    return "\n".join([*lines, "", "formats:", *formats])


def _rest(row: ExportFormat) -> str:
    return " --model ./original" if "model" in row.options else ""


COMMAND: Final = Command(
    "export",
    "write an artifact in the format of another tool: ONNX, AOTInductor, compressed-tensors",
    _example(),
    _add_arguments,
    _run,
)
