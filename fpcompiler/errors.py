"""Every error that fpcompiler raises on purpose.

All derive from :class:`FpcompilerError`, so one ``except`` catches them all. A message says what is
wrong, where in the user's model, and what to do next. Context is added with ``add_note`` while the
exception travels up, so its type survives.
"""

from __future__ import annotations


class FpcompilerError(Exception):
    """Base class of all errors raised on purpose by fpcompiler."""


class FormatError(FpcompilerError, ValueError):
    """A format, scale level, operand or scheme text that means nothing, or cannot be combined."""


class OptionError(FpcompilerError, ValueError):
    """An option, environment variable, recipe or call argument with an unusable value."""


class NumericsError(FpcompilerError, ValueError):
    """Values that cannot be quantized (NaN, infinity) or tensors whose shapes do not fit."""


class CaptureError(FpcompilerError):
    """torch.export could not turn the model into a graph."""


class IRError(FpcompilerError):
    """Text or an operation that is not valid in the compiler's intermediate representation."""


class PassError(FpcompilerError):
    """A pass that could not do its work, or an unknown pass, option or stage in a pipeline."""


class TargetError(FpcompilerError):
    """A target that cannot run what was asked of it."""


class ArtifactError(FpcompilerError):
    """A file that is no artifact, or one that is damaged, foreign or from another version."""


class ExportError(FpcompilerError):
    """A compiled model, or a layer of it, that another format cannot express."""


class CheckpointError(FpcompilerError):
    """A quantized checkpoint that is damaged, contradicts itself, or is of an unknown format."""


class RunError(FpcompilerError):
    """Inputs that do not fit the compiled program, or a step of it that failed."""


class DependencyError(FpcompilerError, ImportError):
    """An optional dependency that is not installed; the message names the command to run."""


def describe_layer(layer: str) -> str:
    """Return the words that name a layer in an error: its module path, or the model itself."""
    return f"layer {layer!r}" if layer else "the model"


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, for a sentence of ours: without the lines behind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
