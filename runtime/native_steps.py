"""The steps of a plan that the native library runs, and what passes between them.

A quantizer whose results only native layers read gives them in the form in which they are
multiplied: no codes are stored in between. What other steps read stays codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fpcompiler.native import library, why_missing
from fpcompiler.numerics.compiled import INPUTS
from fpcompiler.operand import Operand
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import expanded, fused, onednn
from fpcompiler.runtime.arithmetic import takes
from fpcompiler.runtime.expanded import ExpandedLayer, ExpandedLinear, announce
from fpcompiler.runtime.native import NativeLinear, PreparedInput
from fpcompiler.runtime.native_ops import TracedLinear
from fpcompiler.runtime.native_producers import describe
from fpcompiler.runtime.onednn import OneDnnLayer, OneDnnLinear
from fpcompiler.runtime.operators import QUANTIZERS, resolve
from fpcompiler.runtime.ops import LinearArguments

Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """A layer; called with the arguments of ``fpc.linear``.

    Attributes:
        linear: The layer in the library's order.
        reference: The operator; it takes what the library does not.
        traced: What torch.compile sees of the layer.
    """

    linear: NativeLinear
    reference: Function
    traced: TracedLinear

    def __call__(self, *args: Any) -> Tensor:
        """Return what the operator returns."""
        given = LinearArguments(*args)
        x, dtype = given.x, given.dtype
        if isinstance(x[0], PreparedInput):
            return self.linear.multiply(x[0], dtype)
        if not given.x_operand and x[0].dtype != dtype:
            return self.reference(*args)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            return self.traced(x, dtype)
        if given.x_operand:
            return self.linear.multiply(self.linear.prepare_codes(*x), dtype)
        return self.linear(x[0], dtype)


@dataclass(frozen=True, eq=False)
class NativeQuantizer:
    """A quantizer whose results only native layers read.

    Attributes:
        linear: One of the layers; the others take their inputs in the same form.
        traced: What torch.compile sees of that layer.
        scales: How many results the operator has besides the codes.
    """

    linear: NativeLinear
    traced: TracedLinear
    scales: int

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Return the prepared input in place of the codes, and nothing in place of the scales."""
        compiling = torch.compiler.is_compiling()
        prepared = self.traced.prepare(*args) if compiling else self._prepared(*args)
        return [prepared, *(None,) * self.scales]

    def _prepared(self, *args: Any) -> PreparedInput:
        values, layer = args[:-2], args[-1]
        if len(values) == 1:
            return self.linear.prepare(values[0], layer)
        produced = describe(*values)
        if produced is None:
            return self.linear.prepare(fused.produce(*(*values, layer)), layer)
        return self.linear.prepare_produced(produced, layer)


class _Layer(NamedTuple):
    """The arguments of ``fpc.linear`` that are known when a program is loaded."""

    w: list[Tensor]
    bias: Tensor | None
    x_operand: Operand | None
    w_operand: Operand
    k: int
    dtype: torch.dtype
    name: str
    activation: str


def bind_layer(
    step: Step, constants: Mapping[str, Tensor]
) -> NativeLayer | OneDnnLayer | ExpandedLayer | None:
    """Return what runs a layer: the library, or where there is none torch; None: the reference."""
    layer = _read(step, constants) if step.op == "fpc.linear" else ""
    if isinstance(layer, str):
        return None
    if library() is None:
        operator = resolve(step.op)
        return _bind_onednn(layer, operator) or _bind_expanded(layer, operator)
    if not takes(layer.w_operand, layer.w[0].shape[0], layer.k):
        return None
    linear = NativeLinear(*layer[:-1], activation=layer.activation)
    return NativeLayer(linear, resolve(step.op), TracedLinear.of(linear, layer.name))


def refusal(step: Step, constants: Mapping[str, Tensor]) -> str | None:
    """Return why the native library does not run a layer (``fpc.linear``); None if it does."""
    layer = _read(step, constants)
    if isinstance(layer, str):
        return layer
    if takes(layer.w_operand, layer.w[0].shape[0], layer.k):
        return why_missing()
    return f"it takes no weights in {layer.w_operand.format}; give them four bits"


def _read(step: Step, constants: Mapping[str, Tensor]) -> _Layer | str:
    """Return a layer's arguments, or why nothing can be prepared from them."""
    given = _arguments(step)
    if given is None:
        return "its arguments are named, or not as many as it has"
    w = [constants[item["v"]] for item in given.w if item["v"] in constants]
    bias = None if given.bias is None else constants.get(given.bias["v"])
    dtype = getattr(torch, given.dtype["dtype"])
    if len(w) < len(given.w) or (given.bias is not None and bias is None):
        return "its weights or its bias are computed at each call"
    if any(part.device.type != "cpu" for part in w):
        return f"it runs on {w[0].device}"
    if dtype not in INPUTS:
        return f"its results are {dtype}"
    if given.activation and given.activation not in fused.ACTIVATIONS:
        return f"there is no activation {given.activation!r}"
    x_operand = Operand.parse(given.x_operand) if given.x_operand else None
    w_operand = Operand.parse(given.w_operand)
    return _Layer(w, bias, x_operand, w_operand, given.k, dtype, given.layer, given.activation)


def _arguments(step: Step) -> LinearArguments | None:
    """Return the arguments of a layer as they stand in the plan; None if they are not in order."""
    most, optional = len(LinearArguments._fields), len(LinearArguments._field_defaults)
    if step.kwargs or not most - optional <= len(step.args) <= most:
        return None
    return LinearArguments(*step.args)


def _bind_onednn(layer: _Layer, operator: Function) -> OneDnnLayer | None:
    if layer.x_operand is None or not onednn.fits(layer.x_operand, layer.w_operand):
        return None
    if not onednn.usable() or 0 in (layer.k, layer.w[0].shape[0]):
        return None
    operands = layer.x_operand, layer.w_operand
    announce()
    return OneDnnLayer(OneDnnLinear(layer.w, layer.bias, *operands, layer.k), operator)


def _bind_expanded(layer: _Layer, operator: Function) -> ExpandedLayer | None:
    if not expanded.fits(layer.w_operand) or 0 in (layer.k, layer.w[0].shape[0]):
        return None
    linear = ExpandedLinear(layer.w, layer.bias, layer.x_operand, layer.w_operand, layer.k)
    if not linear.is_exact():
        return None
    announce()
    return ExpandedLayer(linear, operator)


def share_inputs(plan: Plan, functions: Sequence[Function]) -> list[Function]:
    """Return the functions of all steps; quantizers for native layers only become native."""
    result = list(functions)
    readers = _readers(plan)
    for index, step in enumerate(plan.steps):
        if step.op not in QUANTIZERS or step.kwargs:
            continue
        layers = [_native_reader(plan.steps[i], functions[i], step) for i in readers[index]]
        kinds = {layer.linear.kind for layer in layers if layer}
        if layers and None not in layers and len(kinds) == 1:
            first = next(layer for layer in layers if layer)
            result[index] = NativeQuantizer(first.linear, first.traced, len(step.outs) - 1)
    return result


_OUTSIDE: Final = -1


def _readers(plan: Plan) -> list[list[int]]:
    """Return the steps that read results of each step; :data:`_OUTSIDE` for the plan's own."""
    makers = {out: index for index, step in enumerate(plan.steps) for out in step.outs}
    readers: list[list[int]] = [[] for _ in plan.steps]
    for index, step in enumerate(plan.steps):
        for maker in {makers[name] for name in step.uses() if name in makers}:
            readers[maker].append(index)
    outside = [out for out in plan.outputs if isinstance(out, str)]
    for name in [*outside, *(value for value, _ in plan.stores)]:
        if name in makers:
            readers[makers[name]].append(_OUTSIDE)
    return readers


def _native_reader(step: Step, function: Function, quantizer: Step) -> NativeLayer | None:
    """Return a layer that reads all results of a quantizer as its input, and nothing else of it."""
    if not isinstance(function, NativeLayer) or step.op != "fpc.linear":
        return None
    outs = [{"v": name} for name in quantizer.outs]
    operand = quantizer.args[-2]
    given = LinearArguments(*step.args)
    return function if list(given.x) == outs and given.x_operand == operand else None
