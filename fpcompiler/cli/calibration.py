"""The options of ``fpcompiler compile`` for methods that learn from data."""

from __future__ import annotations

import argparse
from typing import Any

from fpcompiler.cli.source import call_named
from fpcompiler.cli.tensors import read_inputs
from fpcompiler.errors import OptionError

__all__ = ["add_arguments", "read_batches"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("methods that learn from data")
    group.add_argument(
        "--method",
        default="rtn",
        help="how formats, scales and roundings are found; by default rtn, rounding to nearest; "
        "the others: fpcompiler methods",
    )
    group.add_argument(
        "--attention",
        metavar="OPERAND",
        help="quantize queries, keys and values, for instance to f8E4M3FN@token:f32",
    )
    group.add_argument(
        "--calibration",
        metavar="DATA",
        nargs="+",
        help="batches: .safetensors or .npz files, one call each, or package.module:function, "
        "which returns them",
    )
    group.add_argument(
        "--max-memory", metavar="SIZE", default="4GiB", help="for calibration; by default 4GiB"
    )
    group.add_argument(
        "--work-dir", metavar="DIR", help="keep what is finished there: a killed run goes on"
    )
    group.add_argument("--seed", type=int, default=0, help="of random choices; by default 0")


def read_batches(sources: list[str] | None) -> list[Any] | None:
    """Return the batches that the option names, or None without it.

    Raises:
        OptionError: If a file or function is missing, or is of another kind.
    """
    if sources is None:
        return None
    return [batch for source in sources for batch in _batches(source)]


def _batches(source: str) -> list[Any]:
    if ":" in source and not source.endswith((".safetensors", ".npz")):
        return list(call_named(source))
    inputs = read_inputs(source)
    if inputs.args and inputs.kwargs:
        raise OptionError(
            f"{source} has positional and keyword arguments; calibration data has one kind: name "
            "all of its tensors."
        )
    return [inputs.args or dict(inputs.kwargs)]
