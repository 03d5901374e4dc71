"""What lies between quantized layers, compiled by ``torch.compile``.

Quantized layers and fused quantizers run natively inside (:mod:`~.native_ops`); norms, residual
sums, embeddings and attention become code of Inductor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import list_options

from fpcompiler.errors import FpcompilerError, RunError, first_line
from fpcompiler.runtime.instructions import STEP_ERRORS

Run: TypeAlias = Callable[[Sequence[Tensor]], list[Any]]
"""From one tensor per placeholder to one value per leaf of the outputs."""

_NEXT: Final = "Without compile_rest() it runs all the same."
_NO_COMPILER: Final = "InvalidCxxCompiler"


def compile_rest(run: Run, device: torch.device) -> Run:
    """Return the function as one graph of torch.compile's, which the first call compiles.

    The first call with other sizes compiles once more, for any size.

    Args:
        run: What to compile; its arguments have been checked.
        device: Where it runs.

    Returns:
        A function that raises RunError where torch.compile or what it made fails, with what to do.
    """
    options: dict[str, Any] = {"guard_filter_fn": _guards_of_arguments}
    if device.type == "cuda" and "combo_kernels" in list_options():
        # One launch for what does not depend on each other: between the layers of a decoder's token
        # there are four kernels of a microsecond each.
        options["combo_kernels"] = True
    compiled = torch.compile(own_code(run), fullgraph=True, options=options)

    def call(leaves: Sequence[Tensor]) -> list[Any]:
        try:
            return compiled(leaves)
        except FpcompilerError:
            raise
        except TorchDynamoException as error:
            raise RunError(_compiling_failed(error)) from error
        except STEP_ERRORS as error:
            raise RunError(
                f"The program of torch.compile failed: {first_line(error)}. Call the model "
                "without compile_rest(): then the error names the step."
            ) from error

    return call


def own_code(run: Run) -> Run:
    """Return the same function as one with a code object that no other has.

    torch.compile counts versions by the code object and stops at eight, so eight models would be
    all. (Newer versions of torch have ``isolate_recompiles``.)
    """

    def traced(leaves: Sequence[Tensor]) -> list[Any]:
        return run(leaves)

    code, cells = traced.__code__.replace(), traced.__closure__
    return FunctionType(code, globals(), traced.__name__, None, cells)


def _guards_of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Return which conditions are tested at each call: those on the arguments and on torch itself.

    Nothing of a program changes once it is loaded, and its thousands of conditions take a
    millisecond.
    """
    return ["leaves" in guard.name or not guard.name for guard in guards]


def _compiling_failed(error: TorchDynamoException) -> str:
    """Return what to say of an error of torch.compile itself."""
    if _NO_COMPILER in str(error):
        return (
            "compile_rest: torch.compile found no C++ compiler, which it needs on the CPU. Install "
            f"one (apt-get install g++), or set CXX to yours. {_NEXT}"
        )
    return (
        f"compile_rest: torch.compile failed: {first_line(error)}. TORCH_LOGS=+dynamo,+inductor "
        f"shows where. {_NEXT}"
    )


__all__ = ["Run", "compile_rest", "own_code"]
