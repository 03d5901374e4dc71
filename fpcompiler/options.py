"""Settings from the environment; nothing else in fpcompiler reads it.

===================  ==============================================================================
FPC_DUMP             A folder: every compilation writes its dumps to a new folder inside.
FPC_LOGS             What is logged to stderr: a level (``debug``), parts (``passes,capture``: those
                     at debug), or parts with levels (``passes=info``), separated by commas.
FPC_CACHE            The folder of compiled kernels; by default ``fpcompiler`` in the user's cache
                     folder.
FPC_NATIVE           ``0`` does without the native library, ``require`` refuses to; by default it is
                     used where it was built.
FPC_NATIVE_LIBRARY   A file to load in place of the native library that was built with the package,
                     such as one with sanitizers.
FPC_GRAPHS           ``0`` records no calls as CUDA graphs; by default it is done where kernels of a
                     GPU are used.
FPC_PROGRESS         ``1`` always shows progress bars, ``0`` never; by default on a terminal only.
FPC_ATTENTION        ``0`` leaves attention to torch where artifacts for Hopper have kernels of it,
                     for the few queries of a decoding step.
CUDA_HOME            The folder of the CUDA toolkit whose nvcc compiles kernels; by default the
                     first nvcc on ``PATH``, then that of ``/usr/local/cuda``.
===================  ==============================================================================
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from fpcompiler.errors import OptionError

__all__ = ["Options", "LOG_LEVELS", "LOG_PARTS", "configure_logging", "compiler_environment"]

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
"""Levels that ``FPC_LOGS`` knows."""

LOG_PARTS: Final = (
    "api", "artifact", "calibration", "capture", "cli", "codegen", "ir", "numerics", "passes",
    "runtime",
)  # fmt: skip
"""Parts of fpcompiler that log; each is the logger ``fpcompiler.<part>``."""

_VARIABLES: Final = (
    "FPC_DUMP", "FPC_LOGS", "FPC_CACHE", "FPC_NATIVE", "FPC_NATIVE_LIBRARY", "FPC_PROGRESS",
    "FPC_GRAPHS", "FPC_ATTENTION",
)  # fmt: skip
_NVCC_FLAGS: Final = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
_PROGRESS: Final = {"": None, "auto": None, "1": True, "0": False}
_GRAPHS: Final = {"": None, "auto": None, "0": False}
_ATTENTION: Final = {"": True, "1": True, "0": False}
_NATIVE: Final = {"": None, "auto": None, "1": None, "0": False, "require": True}


@dataclass(frozen=True)
class Options:
    """Settings from the environment.

    Attributes:
        dump: The folder that gets the dumps of every compilation, or None for no dumps.
        logs: The level of each part that logs; the part ``""`` is all of fpcompiler.
        cache: The folder of compiled kernels.
        native: Whether the native library is used; None: where it is there; True: it must be.
        native_library: The file to load in place of the one that was built with the package.
        progress: Whether progress bars are shown; None: on a terminal only.
        cuda_home: The folder of the CUDA toolkit, or None to look for one.
        graphs: False: calls are not recorded as CUDA graphs; None: where kernels are used.
        attention: Whether kernels of attention are used.
    """

    dump: Path | None = None
    logs: Mapping[str, str] = field(default_factory=dict, hash=False)
    cache: Path = field(default_factory=lambda: _default_cache({}))
    progress: bool | None = None
    native: bool | None = None
    native_library: Path | None = None
    cuda_home: Path | None = None
    graphs: bool | None = None
    attention: bool = True

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Options:
        """Return the settings of an environment.

        Args:
            environ: The variables; by default those of this process.

        Raises:
            OptionError: If a value is unusable, or the name of a variable is mistyped.
        """
        env = os.environ if environ is None else environ
        _refuse_mistyped(env)
        progress = env.get("FPC_PROGRESS", "").strip().lower()
        if progress not in _PROGRESS:
            raise OptionError(f"FPC_PROGRESS={progress!r}: it is 1, 0 or auto.")
        native = env.get("FPC_NATIVE", "").strip().lower()
        if native not in _NATIVE:
            raise OptionError(f"FPC_NATIVE={native!r}: it is auto, 0 or require.")
        graphs = env.get("FPC_GRAPHS", "").strip().lower()
        if graphs not in _GRAPHS:
            raise OptionError(f"FPC_GRAPHS={graphs!r}: it is auto or 0.")
        attention = env.get("FPC_ATTENTION", "").strip()
        if attention not in _ATTENTION:
            raise OptionError(f"FPC_ATTENTION={attention!r}: it is 0 or 1.")
        dump = _folder("FPC_DUMP", env.get("FPC_DUMP", ""))
        cache = _folder("FPC_CACHE", env.get("FPC_CACHE", "")) or _default_cache(env)
        logs = _parse_logs(env.get("FPC_LOGS", ""))
        named = _file("FPC_NATIVE_LIBRARY", env.get("FPC_NATIVE_LIBRARY", ""))
        # No FPC_ in front: it is what every tool around CUDA reads.
        cuda = _folder("CUDA_HOME", env.get("CUDA_HOME", ""))
        return cls(
            dump, logs, cache, _PROGRESS[progress], _NATIVE[native], named, cuda, _GRAPHS[graphs],
            _ATTENTION[attention],
        )  # fmt: skip

    @property
    def debug(self) -> bool:
        """Whether everything is logged, so that errors show where they were raised."""
        return self.logs.get("") == "debug"

    def shows_progress(self, stream: TextIO) -> bool:
        """Return whether progress bars are shown on a stream."""
        return stream.isatty() if self.progress is None else self.progress


def _refuse_mistyped(env: Mapping[str, str]) -> None:
    # Only near misses: other programs may have variables that start with FPC_ as well.
    for name in env:
        near = difflib.get_close_matches(name, _VARIABLES, n=1, cutoff=0.8)
        if near and name.startswith("FPC_") and name not in _VARIABLES:
            raise OptionError(
                f"the environment has {name}; did you mean {near[0]}? "
                f"Variables: {', '.join(_VARIABLES)}."
            )


def _folder(name: str, text: str) -> Path | None:
    if not text:
        return None
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise OptionError(f"{name}={text!r} is a file; it must be a folder, or a new name.")
    return path


def _file(name: str, text: str) -> Path | None:
    path = Path(text).expanduser()
    if text and not path.is_file():
        raise OptionError(f"{name}={text!r} is no file; leave it out, or name one that is there.")
    return path if text else None


def _default_cache(env: Mapping[str, str]) -> Path:
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fpcompiler"


def _parse_logs(text: str) -> dict[str, str]:
    entries = (entry.strip().lower() for entry in text.split(","))
    return dict(_parse_log(entry) for entry in entries if entry)


def _parse_log(entry: str) -> tuple[str, str]:
    part, equals, level = entry.partition("=")
    if not equals and part in LOG_LEVELS:
        return "", part
    level = level if equals else "debug"
    for value, known, what in ((part, LOG_PARTS, "part"), (level, LOG_LEVELS, "level")):
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise OptionError(
                f"FPC_LOGS: {value!r} is no {what}; {hint}{what.title()}s: {', '.join(known)}."
            )
    return part, level


def compiler_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment for nvcc without variables that add flags to its command line.

    What it compiles is found again by its command line, so that nothing else may change it.

    Args:
        environ: The variables; by default those of this process.
    """
    env = os.environ if environ is None else environ
    return {name: value for name, value in env.items() if name not in _NVCC_FLAGS}


class _Handler(logging.StreamHandler[TextIO]):
    """The handler that :func:`configure_logging` installs, so that it finds its own again."""


def configure_logging(options: Options, stream: TextIO | None = None) -> None:
    """Log what the options ask for to a stream; with no levels set, change nothing.

    A second call replaces what the first one set.

    Args:
        options: The settings.
        stream: Where to; stderr by default.
    """
    root = logging.getLogger("fpcompiler")
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    for part in ("", *LOG_PARTS):
        level = options.logs.get(part)
        name = f"fpcompiler.{part}" if part else "fpcompiler"
        logging.getLogger(name).setLevel(level.upper() if level else logging.NOTSET)
    if options.logs:
        handler = _Handler(stream or sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
