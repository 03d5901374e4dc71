"""What a command of the command line is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Command", "OK", "FAILED", "STRICT_HELP", "TRUST_HELP"]

OK: Final = 0
"""Exit code of a command that did what was asked."""
FAILED: Final = 1
"""Exit code after an error, and of a verification that failed. A wrong call exits with 2."""

STRICT_HELP: Final = "fail if layers would run without the kernels of their target"
TRUST_HELP: Final = "load the kernels for a GPU as they are in the file"
"""Help of ``--strict``."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What the user types.
        summary: One line for the list of commands.
        example: Lines to copy, shown by ``--help``.
        add_arguments: Declares the arguments.
        run: Does the work and returns the exit code. It imports what it needs itself.
    """

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
