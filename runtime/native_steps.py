"""The steps of a plan that the native library runs, and what passes between them.

A quantizer whose results only native layers read gives them in the form in which they are
multiplied: no codes are stored in between. What other steps read stays codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fpcompiler.native import library, why_missing
from fpcompiler.numerics.compiled import INPUTS
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import expanded, fused, onednn
from fpcompiler.runtime.arithmetic import takes
from fpcompiler.runtime.expanded import ExpandedLayer, ExpandedLinear, announce
from fpcompiler.runtime.layer_steps import LayerArguments, read_layer, shared_quantizers
from fpcompiler.runtime.native import NativeLinear, PreparedInput
from fpcompiler.runtime.native_ops import TracedLinear
from fpcompiler.runtime.native_producers import describe
from fpcompiler.runtime.onednn import OneDnnLayer, OneDnnLinear
from fpcompiler.runtime.operators import resolve
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
        if not given.x_operand and given.x[0].dtype != given.dtype:
            return self.reference(*args)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            return self.traced(given.x, given.dtype, given.residual)
        return self.linear.multiply(self._ready(given), given.dtype, given.residual)

    def _ready(self, given: LinearArguments) -> PreparedInput:
        if isinstance(given.x[0], PreparedInput):
            return given.x[0]
        if given.x_operand:
            return self.linear.prepare_codes(*given.x)
        return self.linear.prepare(given.x[0])


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


def _read(step: Step, constants: Mapping[str, Tensor]) -> LayerArguments | str:
    """Return a layer's arguments, or why the library cannot prepare it."""
    layer = read_layer(step, constants)
    if isinstance(layer, str):
        return layer
    if any(part.device.type != "cpu" for part in layer.w):
        return f"it runs on {layer.w[0].device}"
    return layer if layer.dtype in INPUTS else f"its results are {layer.dtype}"


def _bind_onednn(layer: LayerArguments, operator: Function) -> OneDnnLayer | None:
    if layer.x_operand is None or not onednn.fits(layer.x_operand, layer.w_operand):
        return None
    if not onednn.usable() or 0 in (layer.k, layer.w[0].shape[0]):
        return None
    operands = layer.x_operand, layer.w_operand
    announce()
    return OneDnnLayer(OneDnnLinear(layer.w, layer.bias, *operands, layer.k), operator)


def _bind_expanded(layer: LayerArguments, operator: Function) -> ExpandedLayer | None:
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
    layers = {i: f for i, f in enumerate(functions) if isinstance(f, NativeLayer)}
    kinds = {index: layer.linear.kind for index, layer in layers.items()}
    for index, reader in shared_quantizers(plan, kinds).items():
        first, scales = layers[reader], len(plan.steps[index].outs) - 1
        result[index] = NativeQuantizer(first.linear, first.traced, scales)
    return result
