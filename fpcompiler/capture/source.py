"""Places in the user's source, for errors."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

import torch
from torch import nn

from fpcompiler.errors import describe_layer

_TRACERS: Final = (*map(Path, torch.__path__), Path(__file__).parents[1])
_STANDARD_LIBRARY: Final = Path(sysconfig.get_path("stdlib"))
"""Frames from these say nothing about the model."""

_FRAME: Final = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)$')


def user_frames(trace: TracebackType | None) -> list[tuple[FrameType, int]]:
    """Return the frames of the model's code and their current lines, outermost first."""
    frames = traceback.walk_tb(trace)
    return [(f, line) for f, line in frames if _is_user_code(f.f_code.co_filename)]


def describe_frame(frame: FrameType, line: int) -> str:
    """Return ``file:line in function: `source` ``."""
    code = frame.f_code
    source = traceback.FrameSummary(code.co_filename, line, code.co_name).line
    return f"{code.co_filename}:{line} in {code.co_name}: `{source}`"


def running_layer(model: nn.Module, frames: list[tuple[FrameType, int]]) -> str:
    """Return the words for the innermost submodule whose method is running."""
    names = {id(module): name for name, module in model.named_modules()}
    for frame, _ in reversed(frames):
        arguments = frame.f_code.co_varnames[:1]
        owners = [id(frame.f_locals.get(name)) for name in arguments]
        if owners and owners[0] in names:
            return describe_layer(names[owners[0]])
    return describe_layer("")


def place_in_trace(stack_trace: str) -> str:
    """Return the innermost place of the model's code in the text of a stack trace, or ``""``."""
    found = ""
    lines = stack_trace.splitlines()
    for header, source in zip(lines, [*lines[1:], ""], strict=True):
        match = _FRAME.match(header)
        if match and _is_user_code(match["file"]):
            found = f"{match['file']}:{match['line']} in {match['name']}: `{source.strip()}`"
    return found


def place_of_attribute(module: nn.Module, attribute: str) -> str:
    """Return the line of ``forward`` that names an attribute, or ``""``."""
    try:
        source, start = inspect.getsourcelines(type(module).forward)
        filename = inspect.getsourcefile(type(module))
    except (OSError, TypeError):  # No source: a class made in an interpreter.
        return ""
    for number, line in enumerate(source, start):
        if re.search(rf"\w\.{re.escape(attribute)}\b", line):
            return f"{filename}:{number} in forward: `{line.strip()}`"
    return ""


def first_line(error: Exception) -> str:
    """Return the type and the first line of the message of an error."""
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {message}"


def _is_user_code(filename: str) -> bool:
    path = Path(filename)
    if filename.startswith("<") or any(path.is_relative_to(folder) for folder in _TRACERS):
        return False
    # Packages live inside the folder of the standard library on many systems.
    return "site-packages" in path.parts or not path.is_relative_to(_STANDARD_LIBRARY)
