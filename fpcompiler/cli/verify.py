"""``fpcompiler verify``: check an artifact and replay what was recorded when it was compiled."""

from __future__ import annotations

import argparse
from typing import Final

from fpcompiler.cli.command import FAILED, OK, Command
from fpcompiler.cli.model import FILE_HELP, load_file
from fpcompiler.cli.output import print_json, print_rich, progress
from fpcompiler.errors import ArtifactError

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=FILE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    try:
        with progress("verifying"):
            report = load_file(args.file).verify()
    except ArtifactError as error:
        if not args.json:
            raise
        print_json({"ok": False, "error": str(error), "rows": []})
        return FAILED
    if args.json:
        print_json(report.to_json())
    else:
        print_rich(report)
    return OK if report.ok else FAILED


COMMAND: Final = Command(
    "verify",
    "check an artifact's checksums, shapes and scales, and replay its recorded calls",
    "  fpcompiler verify model.fpc && echo good",
    _add_arguments,
    _run,
)
