"""``fpcompiler methods``: how formats, scales and roundings can be found."""

from __future__ import annotations

import argparse
from typing import Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import print_json, print_table

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler.passes import METHODS, pipeline_text

    rows = [
        (
            name,
            method.description,
            "yes" if method.needs_data else "no",
            pipeline_text(method.passes),
        )
        for name, method in METHODS.items()
    ]
    if args.json:
        keys = ("name", "description", "needs_data", "passes")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return OK
    print_table("methods", ("name", "what it does", "needs data", "passes"), rows)
    return OK


COMMAND: Final = Command(
    "methods",
    "list the methods of compile: how formats, scales and roundings are found",
    "  fpcompiler methods",
    _add_arguments,
    _run,
)
