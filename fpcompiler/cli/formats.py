"""``fpcompiler formats``: the number formats and the named schemes."""

from __future__ import annotations

import argparse
from typing import Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import Row, markdown_table, print_json, print_table, records

__all__ = ["COMMAND", "format_rows", "scheme_rows", "FORMAT_HEADERS", "SCHEME_HEADERS"]

FORMAT_HEADERS: Final = (
    "name", "short", "bits", "largest", "smallest normal", "smallest", "special codes", "source",
)  # fmt: skip
SCHEME_HEADERS: Final = ("name", "weights", "activations", "note")


def format_rows() -> list[Row]:
    """Return a row for each format."""
    from fpcompiler.formats import FORMATS, Specials

    words = {Specials.NONE: "none", Specials.NAN: "NaN", Specials.IEEE: "infinity, NaN"}
    return [
        (
            spec.name, spec.short, spec.storage_bits, spec.max, 2.0**spec.min_exponent,
            spec.smallest, words[spec.specials], spec.source,
        )
        for spec in FORMATS.values()
    ]  # fmt: skip


def scheme_rows() -> list[Row]:
    """Return a row for each named scheme."""
    from fpcompiler.scheme import PRESETS

    return [(row.name, row.weight, row.activation, row.note) for row in PRESETS.values()]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print the tables of the README")


def _run(args: argparse.Namespace) -> int:
    formats, schemes = format_rows(), scheme_rows()
    if args.json:
        print_json(
            {
                "formats": records(FORMAT_HEADERS, formats),
                "schemes": records(SCHEME_HEADERS, schemes),
            }
        )
    elif args.markdown:
        print(markdown_table(FORMAT_HEADERS, formats), end="\n\n")
        print(markdown_table(SCHEME_HEADERS, schemes))
    else:
        print_table("formats", FORMAT_HEADERS, formats)
        print_table("schemes", SCHEME_HEADERS, schemes)
    return OK


COMMAND: Final = Command(
    "formats",
    "list the number formats and the named schemes",
    "  fpcompiler formats\n  fpcompiler formats --json | jq '.schemes[].name'",
    _add_arguments,
    _run,
)
