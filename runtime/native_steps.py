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
from fpcompiler.runtime import fused, onednn
from fpcompiler.runtime.native import NativeLinear, PreparedInput, takes
from fpcompiler.runtime.native_producers import describe
from fpcompiler.runtime.onednn import OneDnnLayer, OneDnnLinear
from fpcompiler.runtime.operators import QUANTIZERS, resolve

Function: TypeAlias = Callable[..., Any]

_X, _W, _BIAS, _X_OPERAND, _W_OPERAND, _K, _DTYPE, _LAYER = range(8)
"""Positions of the arguments of ``fpc.linear``."""


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """A layer; called with the arguments of ``fpc.linear``.

    Attributes:
        linear: The layer in the library's order.
        reference: The operator; torch.compile traces it, and it takes what the library does not.
    """

    linear: NativeLinear
    reference: Function

    def __call__(
        self,
        x: Sequence[Any],
        w: Sequence[Tensor],
        bias: Tensor | None,
        x_operand: str,
        w_operand: str,
        k: int,
        dtype: torch.dtype,
        layer: str,
    ) -> Tensor:
        """Return what the operator returns."""
        if torch.compiler.is_compiling():
            return self.reference(x, w, bias, x_operand, w_operand, k, dtype, layer)  # type: ignore[no-any-return]
        if isinstance(x[0], PreparedInput):
            return self.linear.multiply(x[0], dtype)
        if x_operand:
            return self.linear.multiply(self.linear.prepare_codes(*x), dtype)
        if x[0].dtype != dtype:
            return self.reference(x, w, bias, x_operand, w_operand, k, dtype, layer)  # type: ignore[no-any-return]
        return self.linear(x[0], dtype)


@dataclass(frozen=True, eq=False)
class NativeQuantizer:
    """A quantizer whose results only native layers read.

    Attributes:
        linear: One of the layers; the others take their inputs in the same form.
        reference: The operator, which torch.compile traces.
        scales: How many results the operator has besides the codes.
    """

    linear: NativeLinear
    reference: Function
    scales: int

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Return the prepared input in place of the codes, and nothing in place of the scales."""
        if torch.compiler.is_compiling():
            return self.reference(*args)  # type: ignore[no-any-return]
        return [self._prepared(*args), *(None,) * self.scales]

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


def bind_layer(step: Step, constants: Mapping[str, Tensor]) -> NativeLayer | OneDnnLayer | None:
    """Return what runs a layer: the library, or oneDNN where there is none; None: neither does."""
    layer = _read(step, constants) if step.op == "fpc.linear" else ""
    if isinstance(layer, str):
        return None
    if library() is None:
        return _bind_onednn(layer, resolve(step.op))
    if not takes(layer.w_operand, layer.w[0].shape[0], layer.k):
        return None
    return NativeLayer(NativeLinear(*layer), resolve(step.op))


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
    if step.kwargs:
        return "its arguments are named"
    args = step.args
    w = [constants[item["v"]] for item in args[_W] if item["v"] in constants]
    bias = None if args[_BIAS] is None else constants.get(args[_BIAS]["v"])
    dtype = getattr(torch, args[_DTYPE]["dtype"])
    if len(w) < len(args[_W]) or (args[_BIAS] is not None and bias is None):
        return "its weights or its bias are computed at each call"
    if any(part.device.type != "cpu" for part in w):
        return f"it runs on {w[0].device}"
    if dtype not in INPUTS:
        return f"its results are {dtype}"
    x_operand = Operand.parse(args[_X_OPERAND]) if args[_X_OPERAND] else None
    w_operand = Operand.parse(args[_W_OPERAND])
    return _Layer(w, bias, x_operand, w_operand, args[_K], dtype, args[_LAYER])


def _bind_onednn(layer: _Layer, operator: Function) -> OneDnnLayer | None:
    if layer.x_operand is None or not onednn.fits(layer.x_operand, layer.w_operand):
        return None
    if not onednn.usable() or 0 in (layer.k, layer.w[0].shape[0]):
        return None
    operands = layer.x_operand, layer.w_operand
    return OneDnnLayer(OneDnnLinear(layer.w, layer.bias, *operands, layer.k), operator)


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
            result[index] = NativeQuantizer(first.linear, functions[index], len(step.outs) - 1)
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
    fits = list(step.args[_X]) == outs and step.args[_X_OPERAND] == operand
    return function if fits else None
