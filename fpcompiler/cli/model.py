"""Where the commands that run a compiled model get it from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    from fpcompiler.runtime.model import CompiledModel
    from fpcompiler.runtime.onnx_model import OnnxModel

__all__ = ["FILE_HELP", "ONNX", "SUFFIXES", "load_file"]

ONNX = ".onnx"
"""What the name of an ONNX file ends with."""
SUFFIXES = (".fpc", ONNX)
"""Files that :func:`load_file` reads."""
FILE_HELP = "an artifact, or an ONNX file of `fpcompiler export`"


def load_file(
    file: str,
    device: str = "cpu",
    strict: bool = False,
    trust: bool = False,
    reproducible: bool = False,
) -> CompiledModel | OnnxModel:
    """Return the model of a file: an artifact, or an ONNX file on onnxruntime.

    Args:
        file: Its path; that of an ONNX file ends with ``.onnx``.
        device: Where to run.
        strict: As for an artifact.
        trust: As for an artifact.
        reproducible: As for an artifact.

    Raises:
        OptionError: If one of these is asked of an ONNX file.
        FpcompilerError: As :func:`fpcompiler.load` does.
    """
    from fpcompiler.runtime.loading import load

    if not file.endswith(ONNX):
        return load(file, device, strict=strict, trust=trust, reproducible=reproducible)
    flags = {"--strict": strict, "--trust": trust, "--reproducible": reproducible}
    for flag in (name for name, given in flags.items() if given):
        raise OptionError(f"{flag} is for artifacts; {file} is an ONNX file.")
    return load(file, device, backend="onnxruntime")
