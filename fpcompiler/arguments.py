"""Arguments of the wrong type are refused with what to write, before any work is done."""

from __future__ import annotations

import os
from typing import Final

from fpcompiler.errors import OptionError

PATH: Final = (str, os.PathLike)
"""What names a file or folder."""


def require_type(name: str, value: object, kinds: tuple[type, ...], wanted: str) -> None:
    """Check the type of an argument.

    Args:
        name: Of the argument.
        value: What was given.
        kinds: What it may be.
        wanted: That in words, with an example.

    Raises:
        OptionError: If it is something else.
    """
    if not isinstance(value, kinds):
        raise OptionError(f"{name} must be {wanted}, not {type(value).__name__}.")
