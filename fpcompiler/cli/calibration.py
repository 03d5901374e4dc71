"""The options of ``fpcompiler compile`` for methods that learn from data."""

from __future__ import annotations

import argparse
from typing import Any

from fpcompiler.cli.source import call_named
from fpcompiler.cli.tensors import read_inputs
from fpcompiler.errors import FpcompilerError, OptionError

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
        metavar="OPERANDS",
        help="quantize attention: an operand for queries, keys and values, such as "
        "f8E4M3FN@token:f32, or some of qkv=OPERAND,weights=OPERAND,cache=OPERAND (weights: after "
        "softmax; cache: keys and values that the model keeps in buffers, stored in few bits)",
    )
    group.add_argument(
        "--effective-bits",
        metavar="BITS",
        type=float,
        help="give some layers wider or narrower weights than the scheme, where that does least "
        "damage, so that a weight takes this many bits on average, scales included: 4.5",
    )
    group.add_argument(
        "--round-budget",
        metavar="TIME",
        help="what learning roundings may take (methods adaround and alike): 90s, 5min, 1h",
    )
    group.add_argument(
        "--share-scales",
        action="store_true",
        help="nvfp4: one scale of the tensor for weights that share an input, as servers of "
        "checkpoints want it",
    )
    group.add_argument(
        "--static-inputs",
        action="store_true",
        help="nvfp4: scales of the inputs' tensors from the calibration data, for servers too",
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
        "--work-dir",
        metavar="DIR",
        help="keep what is finished there, so that a killed run goes on: up to the size of the "
        "artifact for each set of options, and the activations that a killed run still needs; it "
        "may be deleted whenever no run uses it",
    )
    group.add_argument("--seed", type=int, default=0, help="of random choices; by default 0")


def read_batches(sources: list[str] | None) -> list[Any] | None:
    """Return the batches that the option names, or None without it.

    Raises:
        OptionError: If a file or function is missing, of another kind, or fails.
    """
    if sources is None:
        return None
    return [batch for source in sources for batch in _batches(source)]


def _batches(source: str) -> list[Any]:
    from fpcompiler.calibration import draw

    if ":" in source and not source.endswith((".safetensors", ".npz")):
        return list(draw(_called(source)))
    inputs = read_inputs(source)
    if inputs.args and inputs.kwargs:
        raise OptionError(
            f"{source} has positional and keyword arguments; calibration data has one kind: name "
            "all of its tensors."
        )
    return [inputs.args or dict(inputs.kwargs)]


def _called(source: str) -> Any:
    """Return what the function of a user returns, who may have made any mistake in it."""
    try:
        return call_named(source)
    except FpcompilerError:
        raise
    except Exception as error:  # as the code of a user can raise anything
        raise OptionError(
            f"{source}() failed: {type(error).__name__}: {error}. Call it on its own to see where."
        ) from error
