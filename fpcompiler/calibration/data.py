"""From what a user gives as calibration data to the tensors of calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fpcompiler.errors import FpcompilerError, OptionError
from fpcompiler.plan import Signature
from fpcompiler.runtime.inputs import Takes, bind, check, leaf_names

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments."""


def calls(batches: Iterable[Any]) -> tuple[Call, ...]:
    """Return each batch as the arguments of a call.

    Args:
        batches: Each a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Raises:
        OptionError: If there is none, or drawing one fails; the message says which.
    """
    found = tuple(_call(batch) for batch in draw(batches))
    if not found:
        raise OptionError("the calibration data is empty; give at least one batch.")
    return found


def draw(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches from data of a user, whose code can fail in any way.

    Raises:
        OptionError: If these are not several batches, or drawing one fails; the message says which.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise OptionError(
            "calibration must be several batches, or a list of one such as [x], not one "
            f"{type(batches).__name__}."
        )
    drawn = 0
    try:
        for batch in batches:
            drawn += 1
            yield batch
    except FpcompilerError:
        raise
    except Exception as error:  # as the code of a user can raise anything
        raise OptionError(
            f"calibration batch {drawn + 1} cannot be drawn: {type(error).__name__}: {error}. "
            "Iterate over the calibration data on its own to see where."
        ) from error


def _call(batch: Any) -> Call:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def bind_calls(
    signature: Signature, program: Takes, given: Iterable[Call]
) -> tuple[tuple[Tensor, ...], ...]:
    """Return the tensors of each call, in the order of the program's arguments.

    Args:
        signature: How the model is called.
        program: The dtypes and shapes that it takes.
        given: The calls.

    Raises:
        RunError: If a batch does not fit the captured call; a note says which.
    """
    return tuple(_bind(signature, program, number, call) for number, call in enumerate(given))


def _bind(signature: Signature, program: Takes, number: int, call: Call) -> tuple[Tensor, ...]:
    try:
        leaves = bind(signature, *call)
        check(program, leaf_names(signature), leaves, None)
        return tuple(leaves)
    except FpcompilerError as error:
        error.add_note(f"in calibration batch {number + 1}")
        raise
