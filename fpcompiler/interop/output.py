"""Files of exports take their places when all of them are there, or leave nothing behind."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, final

from fpcompiler.errors import ExportError

__all__ = ["Sink", "new_files", "not_written"]


@contextlib.contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """Yield a folder whose files take their places beside the path when all of them are there.

    The file of the path's own name comes last: where it is new, so is all that it refers to.

    Raises:
        ExportError: If the path is a folder, or files cannot be written beside it.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file.")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise not_written(path, error) from error
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def not_written(path: Path, error: OSError) -> ExportError:
    """Return what to raise when a file could not be written."""
    return ExportError(
        f"{path} could not be written: {error.strerror or error}. Choose a folder that exists, is "
        "writable and has room."
    )


@final
class Sink(io.RawIOBase):
    """A file for torch's writer, whose destructor ends the process if a write of it fails.

    Args:
        file: The file. After the first error nothing more is written to it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return that it is; torch asks."""
        return True

    def seekable(self) -> bool:
        """Return that it is; torch asks."""
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Take all bytes, and note the error if they cannot be written."""
        view = memoryview(data).cast("B")
        size = done = len(view)
        try:
            done = 0 if self.error is None else size
            while done < size:
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = error
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, as torch does when all is written."""
        return self._file.seek(offset, whence)
