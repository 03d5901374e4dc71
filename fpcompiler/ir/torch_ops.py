"""How an operation of the torch dialect is executed: the function, and its arguments.

Shared by :mod:`fpcompiler.ir.raise_to_fx`, which records the calls, and
:mod:`fpcompiler.ir.evaluate`, which makes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import fx
from torch_mlir import ir
from torch_mlir.extras.fx_importer import (
    TORCH_DTYPE_TO_INT,
    TORCH_LAYOUT_TO_INT,
    TORCH_MEMORY_FORMAT_TO_INT,
)

from fpcompiler.errors import IRError
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.types import tensor_type

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A function with its positional and keyword arguments."""

_DTYPES: Final = {number: dtype for dtype, number in TORCH_DTYPE_TO_INT.items()}
_LAYOUTS: Final = {number: layout for layout, number in TORCH_LAYOUT_TO_INT.items()}
_MEMORY_FORMATS: Final = {number: form for form, number in TORCH_MEMORY_FORMAT_TO_INT.items()}

SCALAR_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "div": operator.truediv,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "remainder": operator.mod,
}
"""Python functions for torch's operations on scalars, whose overloads end in int or float."""

_SCALAR_OVERLOADS: Final = ("int", "float", "float_int", "int_float")

# MLIR tensors have no strides: canonicalize drops aten.clone, after which a view of a permuted
# tensor would not be legal in eager torch.
_RESHAPED: Final = ("torch.aten.view", "torch.aten._unsafe_view")


def text_of(attribute: ir.Attribute) -> str:
    """Return the text of a string attribute."""
    return str(ir.StringAttr(attribute).value)


def operator_name(op: ir.Operation) -> str:
    """Return the name of an operation, or of the operator that a ``torch.operator`` stands for."""
    return text_of(op.attributes["name"]) if op.name == "torch.operator" else str(op.name)


def constant_value(op: ir.Operation) -> Any:
    """Return the Python value of a ``torch.constant.*``."""
    kind = op.name.rsplit(".", 1)[1]
    if kind == "none":
        return None
    value = op.attributes["value"]
    if kind == "device":
        return torch.device(text_of(value))
    if kind == "str":
        return text_of(value)
    if kind == "float":
        return ir.FloatAttr(value).value
    number = ir.IntegerAttr(value).value
    return bool(number) if kind == "bool" else number


def literal_value(op: ir.Operation) -> torch.Tensor:
    """Return the tensor of a ``torch.vtensor.literal``."""
    kind = tensor_type(op.results[0])
    assert kind is not None
    array = np.array(ir.DenseElementsAttr(op.attributes["value"]))
    sizes = [size for size in kind.shape if size is not None]
    return torch.from_numpy(array.copy()).to(kind.dtype).reshape(sizes)


def resolve(op: ir.Operation, args: Sequence[Any]) -> Call:
    """Return the call that executes a torch operation on Python or FX arguments.

    Raises:
        IRError: If torch has no such operator.
    """
    name = operator_name(op)
    if name == "torch.aten.size.int":
        return torch.ops.aten.sym_size.int, tuple(args), {}
    if name == "torch.aten.__getitem__.t":
        return operator.getitem, tuple(args), {}
    if name == "torch.prim.NumToTensor.Scalar":
        return torch.ops.aten.scalar_tensor.default, (args[0],), _scalar_tensor_options(op)
    base, _, last = name.removeprefix("torch.aten.").rpartition(".")
    if name.startswith("torch.aten.") and last in _SCALAR_OVERLOADS and base in SCALAR_FUNCTIONS:
        return SCALAR_FUNCTIONS[base], tuple(args), {}
    function = _overload("torch.aten.reshape" if name in _RESHAPED else name, op)
    return function, *_arguments(function, args)


def _scalar_tensor_options(op: ir.Operation) -> dict[str, Any]:
    kind = tensor_type(op.results[0])
    assert kind is not None
    return {"dtype": kind.dtype}


def _overload(name: str, op: ir.Operation) -> Any:
    """Return the torch operator of a name such as ``torch.aten.mul.Tensor``."""
    namespace, base, *overload = name.removeprefix("torch.").split(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    function = getattr(packet, overload[0] if overload else "default", None)
    if function is None:
        raise IRError(
            f"{place_of(op)}: the operation {op.name} ({name}) cannot be executed; it is no "
            "operator of this version of torch. Passes must emit torch or fpq operations only."
        )
    return function


def _arguments(function: Any, args: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split operands into positional and keyword arguments and restore enumerations."""
    schema = function._schema.arguments
    pairs = [(a, _restore(a, value)) for a, value in zip(schema, args, strict=False)]
    positional = tuple(value for argument, value in pairs if not argument.kwarg_only)
    keywords = {a.name: v for a, v in pairs if a.kwarg_only and v is not None}
    return positional, keywords


def _restore(argument: Any, value: Any) -> Any:
    """Turn the number that stands for a dtype, layout or memory format back into it."""
    if not isinstance(value, int) or isinstance(value, fx.Node):
        return value
    kind = str(argument.real_type)
    if "ScalarType" in kind:
        return _DTYPES[value]
    if "MemoryFormat" in kind:
        return _MEMORY_FORMATS[value]
    return _LAYOUTS[value] if "Layout" in kind else value
