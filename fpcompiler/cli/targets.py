"""``fpcompiler targets``: what each target multiplies, and whether there are kernels for it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.output import Row, print_json, print_table

__all__ = ["COMMAND"]

_TARGET_HEADERS: Final = ("name", "machine", "status", "note")
_KIND_HEADERS: Final = ("target", "kind", "instruction", "weights", "activations", "K", "rate")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from fpcompiler.target import TARGETS

    targets = TARGETS.values()
    if args.json:
        print_json([{**dataclasses.asdict(t), "status": t.status.value} for t in targets])
        return OK
    print_table(
        "targets", _TARGET_HEADERS, [(t.name, t.machine, t.status.value, t.note) for t in targets]
    )
    print_table("what they multiply", _KIND_HEADERS, _kind_rows())
    return OK


def _kind_rows() -> list[Row]:
    from fpcompiler.target import TARGETS

    return [
        (
            target.name, kind.name, kind.instruction, _short(kind.weights),
            _short(kind.activations) or "16 bits", kind.k_alignment, kind.rate,
        )
        for target in TARGETS.values()
        for kind in target.kinds
    ]  # fmt: skip


def _short(names: tuple[str, ...]) -> str:
    from fpcompiler.formats import FORMATS

    if len(names) == sum(spec.signed for spec in FORMATS.values()):
        return "all"
    return " ".join(FORMATS[name].short for name in names)


COMMAND: Final = Command(
    "targets",
    "list the targets: what their hardware multiplies, and which have kernels",
    "  fpcompiler targets",
    _add_arguments,
    _run,
)
