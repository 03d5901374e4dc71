"""The plan of an artifact as a program of ``torch.export``: what the writers begin with.

The steps are called once with tensors that have no data, and torch records the calls. So sizes vary
as they do in the artifact, and no operator of a model has to be written again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fpcompiler.errors import ExportError, FpcompilerError, describe_layer, first_line
from fpcompiler.plan import Placeholder, Plan
from fpcompiler.runtime import operators
from fpcompiler.runtime.instructions import STEP_ERRORS, last_uses

__all__ = [
    "Function", "Sizes", "near_layer", "quiet", "register_tensors", "run_steps", "trace",
]  # fmt: skip

Function = Callable[..., Any]
"""What runs a step, called with its decoded arguments."""

_CPU: Final = torch.device("cpu")
_FIRST_SIZE: Final = 5
"""Symbols get this size and odd ones above it: not 0 or 1, which torch takes as fixed."""
_LOGGERS: Final = ("torch.onnx", "torch._subclasses.fake_tensor", "torch.export", "onnxscript")
_LINEAR: Final = re.compile(r"(?:(\d+)\*)?([a-zA-Z_]\w*)(?: ([+-]) (\d+))?", re.ASCII)
"""Sizes that torch.export can be told of: a symbol, times a number, plus or minus a number."""


def register_tensors(
    module: nn.Module, keys: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Register tensors as buffers under their names: modules are made for the parts before a dot.

    Returns:
        The path of each buffer by key. It is the key, but for parts that are taken already:
        ``head.weight`` cannot be a tensor beside ``head.weight.codes``.
    """
    return {key: _register(module, key.split("."), tensors[key]) for key in sorted({*keys})}


def _register(module: nn.Module, parts: Sequence[str], tensor: Tensor) -> str:
    path = []
    for part in parts[:-1]:
        name = part if part.isidentifier() or part.isdigit() else re.sub(r"\W", "_", part)
        while hasattr(module, name) and not isinstance(getattr(module, name), nn.Module):
            name += "_"
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
        path.append(name)
    name = re.sub(r"\W", "_", parts[-1])
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, tensor)
    return ".".join([*path, name])


def run_steps(plan: Plan, functions: Sequence[Function], values: dict[str, Any]) -> None:
    """Run the steps of a plan, which torch records.

    Args:
        plan: The plan.
        functions: What runs each step.
        values: The inputs, constants and states by name; the results take their places.

    Raises:
        ExportError: If torch cannot record a step; the message names the layer.
    """
    frees = last_uses(plan)
    for index, (step, function) in enumerate(zip(plan.steps, functions, strict=True)):
        args = [_fill(arg, values) for arg in step.args]
        kwargs = {name: _fill(arg, values) for name, arg in step.kwargs.items()}
        try:
            result = function(*args, **kwargs)
        except FpcompilerError:
            raise
        except STEP_ERRORS as error:
            raise _not_recorded(plan, index, error) from error
        if len(step.outs) > 1 or step.op in operators.QUANTIZERS:
            values.update(zip(step.outs, result, strict=True))
        else:
            values[step.outs[0]] = result
        for name in frees.get(index, ()):
            del values[name]


def near_layer(plan: Plan, index: int) -> str:
    """Return words for the layer of a step, or the last one before it."""
    layers = [step.layer for step in plan.steps[: index + 1] if step.layer]
    if not layers:
        return "the model"
    return describe_layer(layers[-1]) if plan.steps[index].layer else f"behind layer {layers[-1]!r}"


def _not_recorded(plan: Plan, index: int, error: Exception) -> ExportError:
    return ExportError(
        f"{near_layer(plan, index)}: torch cannot record step {index} ({plan.steps[index].op}): "
        f"{first_line(error)}. Replace the operation in the model, or run the artifact as it is."
    )


def _fill(argument: Any, values: Mapping[str, Any]) -> Any:
    return operators.fill(operators.decode(argument, _CPU), values)


class Sizes:
    """The sizes of a plan's inputs: as numbers to trace with, and as what torch.export is told.

    Args:
        plan: The plan.

    Raises:
        ExportError: If an input has a size that torch.export has no words for.
    """

    def __init__(self, plan: Plan) -> None:
        self._numbers: dict[str, int] = {}
        self._dims: dict[str, Any] = {}
        for index, (name, symbol) in enumerate(plan.symbols.items()):
            wanted = max(symbol.min, _FIRST_SIZE + 2 * index)
            self._numbers[name] = wanted if symbol.max is None else min(wanted, symbol.max)
            fixed = symbol.min == symbol.max
            self._dims[name] = symbol.min if fixed else Dim(name, min=symbol.min, max=symbol.max)
        self.tensors = [self._tensor(placeholder) for placeholder in plan.placeholders]
        """A tensor of zeros for each input."""
        self.dims = [self._axes(placeholder) for placeholder in plan.placeholders]
        """What torch.export is told of the axes of each that vary."""

    def _tensor(self, placeholder: Placeholder) -> Tensor:
        dtype = getattr(torch, placeholder.dtype)
        sizes = [
            size if isinstance(size, int) else self._evaluate(placeholder, size, self._numbers)
            for size in placeholder.shape
        ]
        return torch.zeros(sizes, dtype=dtype)

    def _axes(self, placeholder: Placeholder) -> dict[int, Any]:
        found = {
            axis: self._evaluate(placeholder, size, self._dims)
            for axis, size in enumerate(placeholder.shape)
            if isinstance(size, str)
        }
        return {axis: dim for axis, dim in found.items() if not isinstance(dim, int)}

    def _evaluate(self, placeholder: Placeholder, size: str, symbols: Mapping[str, Any]) -> Any:
        match = _LINEAR.fullmatch(size)
        if match is None or match[2] not in symbols:
            raise ExportError(
                f"the input {placeholder.name!r} has the size {size}, and torch.export takes only "
                "multiples of a size plus a number. Compile the model with other dynamic sizes."
            )
        value = symbols[match[2]] if match[1] is None else int(match[1]) * symbols[match[2]]
        if match[3] is None:
            return value
        return value + int(match[4]) if match[3] == "+" else value - int(match[4])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch logs, warns of and prints off the terminal; what fails is raised."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(module: nn.Module, args: tuple[Any, ...], dims: Any) -> ExportedProgram:
    """Record what a module computes.

    Args:
        module: The module.
        args: Example arguments.
        dims: Their sizes that vary, as ``dynamic_shapes`` of torch.export.

    Raises:
        ExportError: If torch.export cannot record it.
    """
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, dynamic_shapes=dims, strict=False)
    except FpcompilerError:
        raise
    except STEP_ERRORS as error:
        raise ExportError(
            f"torch.export could not record the program: {first_line(error)}. Compile the model "
            "with fewer sizes that vary (dynamic=), or with the torch that is installed here."
        ) from error
