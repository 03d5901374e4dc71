"""From a PyTorch model to a graph: torch.export with sizes that may vary, and errors that help.

:func:`capture` calls ``torch.export.export`` on a model that it leaves as it found it;
:func:`from_exported` takes a program that the user exported. Both give a
:class:`CapturedProgram`: a functional graph of ``aten`` operators with the call signature, the
ranges of its sizes, and notes on what was decided.
"""

from fpcompiler.capture.export import capture
from fpcompiler.capture.program import CapturedProgram, from_exported
from fpcompiler.capture.shapes import shapes_of_call

__all__ = ["CapturedProgram", "capture", "from_exported", "shapes_of_call"]
