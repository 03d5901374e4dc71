"""Where a compilation writes its dumps."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from fpcompiler.errors import OptionError
from fpcompiler.options import Options

__all__ = ["Dumps"]


@dataclass(frozen=True)
class Dumps:
    """Where dumps go.

    Attributes:
        folder: The folder; None for no dumps.
        weights: Whether with the values of weights.
    """

    folder: Path | None
    weights: bool

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None, *, weights: bool) -> Dumps:
        """Return dumps into a folder, or by default into a new one inside ``FPC_DUMP``.

        Raises:
            OptionError: If no folder can be made in ``FPC_DUMP``.
        """
        return cls(_new_folder() if folder is None else Path(folder), weights)


def _new_folder() -> Path | None:
    root = Options.from_env().dump
    if root is None:
        return None
    for number in itertools.count(1):
        folder = root / f"compile-{number:03}"
        try:
            # Made at once: another compilation must not choose it before this one writes to it.
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OptionError(f"FPC_DUMP: {folder} cannot be made: {error.strerror}.") from error
        break
    return folder
