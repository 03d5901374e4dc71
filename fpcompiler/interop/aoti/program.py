"""The plan of an artifact as a module whose quantized layers are native operators.

Those are the operators that torch.compile sees (:mod:`fpcompiler.runtime.native_ops`): they take
what the native library reads as tensors, which are constants of the model in a package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.artifact import Artifact
from fpcompiler.errors import ExportError, describe_layer
from fpcompiler.interop.program import Function, near_layer
from fpcompiler.interop.pt2 import PlanModule
from fpcompiler.numerics.compiled import INPUTS
from fpcompiler.numerics.hadamard import sylvester, transform
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import backends, fused
from fpcompiler.runtime.layer_steps import arguments_of, weight_names
from fpcompiler.runtime.native import InputKind
from fpcompiler.runtime.native_ops import Prepared, TracedLinear
from fpcompiler.runtime.native_producers import takes
from fpcompiler.runtime.native_steps import NativeLayer, refusal
from fpcompiler.runtime.operators import QUANTIZERS

__all__ = ["native_module"]

_CPU: Final = "cpu"
_NEXT: Final = "Export to pt2, which takes all operators."


def native_module(artifact: Artifact) -> PlanModule:
    """Return the program of an artifact with native layers, for torch to record.

    The target that it was compiled for does not matter: what a layer computes does not depend on
    it.

    Raises:
        ExportError: If the native library does not run a step; the message names the layer.
    """
    plan = replace(artifact.plan, steps=tuple(map(_on_cpu, artifact.plan.steps)))
    writer = _Writer(plan, {n: artifact.tensors[key] for n, key in plan.constants.items()})
    for index in range(len(plan.steps)):
        writer.add(index)
    return PlanModule(writer.plan(), {**artifact.tensors, **writer.tensors}, writer.functions)


def _on_cpu(step: Step) -> Step:
    return replace(step, kernel=_CPU) if step.op.startswith("fpc.") else step


class _Writer:
    """Makes a plan in which native layers take their tensors as values.

    Args:
        plan: The plan, for the target ``cpu``.
        constants: Its constants by value name.
    """

    def __init__(self, plan: Plan, constants: Mapping[str, Tensor]) -> None:
        self._plan, self._given = plan, constants
        self._bound = [backends.bind(step, constants) for step in plan.steps]
        self._readers = _readers(plan)
        self._steps: list[Step] = []
        self._constants: dict[str, str] = {}
        self._first: dict[tuple[str, ...], str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.functions: list[Function] = []

    def plan(self) -> Plan:
        """Return the plan, with the constants that it reads."""
        used = {name for step in self._steps for name in step.uses()}
        used.update(out for out in self._plan.outputs if isinstance(out, str))
        used.update(value for value, _ in self._plan.stores)
        constants = {name: key for name, key in self._plan.constants.items() if name in used}
        constants |= self._constants
        return replace(self._plan, steps=tuple(self._steps), constants=constants)

    def add(self, index: int) -> None:
        """Add a step of the plan."""
        step, function = self._plan.steps[index], self._bound[index]
        if isinstance(function, NativeLayer):
            step, function = self._layer(step, function)
        elif step.op in QUANTIZERS and self._is_for_layers(index):
            function = _Quantizer(len(step.outs) - 1)
        elif step.op == "fpc.hadamard":
            matrix = self._constant("hadamard", str(step.args[1]), sylvester(step.args[1]))
            step, function = replace(step, args=(step.args[0], matrix)), _hadamard
        elif step.op.startswith("fpc."):
            raise ExportError(f"{near_layer(self._plan, index)}: {self._why(step)}. {_NEXT}")
        self._steps.append(step)
        self.functions.append(function)

    def _is_for_layers(self, index: int) -> bool:
        """Return whether native layers read the results of a quantizer, and nothing else does."""
        outs = self._plan.steps[index].outs
        readers = [reader for out in outs for reader in self._readers.get(out, ())]
        return all(r is not None and isinstance(self._bound[r], NativeLayer) for r in readers)

    def _layer(self, step: Step, function: NativeLayer) -> tuple[Step, Function]:
        given, traced = arguments_of(step), function.traced
        assert given is not None
        # Layers with the same weights share them here too.
        same = (*weight_names(step), bytes(traced.about.numpy()).hex())
        name = self._first.setdefault(same, f"{given.layer or step.outs[0]}.{len(self._first)}")
        parts = {"about": traced.about, "data": traced.data, "scale": traced.scale}
        if traced.bias is not None:
            parts["bias"] = traced.bias
        values = [self._constant(name, part, tensor) for part, tensor in parts.items()]
        # torch writes names into C++ as they are.
        layer = given.layer.replace("\\", "/").replace('"', "'")
        native = _Layer(replace(traced, layer=layer), function.linear.kind, tuple(parts))
        return replace(step, args=([*given.x], given.dtype, given.residual, *values)), native

    def _constant(self, name: str, part: str, tensor: Tensor) -> dict[str, str]:
        value = f"native.{name}.{part}"
        self._constants[value], self.tensors[value] = value, tensor
        return {"v": value}

    def _why(self, step: Step) -> str:
        if step.op == "fpc.linear":
            return f"the native library does not run it: {refusal(step, self._given)}"
        if step.op in QUANTIZERS:
            return (
                f"the codes that {step.op} gives are read by something else than native layers "
                "(quantized attention or a quantized cache), and a package has no operator for that"
            )
        return f"a package of AOTInductor has no native operator for {step.op}"


def _readers(plan: Plan) -> dict[str, list[int | None]]:
    """Return the steps that read each value; None for the results and states of the plan."""
    readers: dict[str, list[int | None]] = {}
    for index, step in enumerate(plan.steps):
        for name in step.uses():
            readers.setdefault(name, []).append(index)
    outside = [out for out in plan.outputs if isinstance(out, str)]
    for name in [*outside, *(value for value, _ in plan.stores)]:
        readers.setdefault(name, []).append(None)
    return readers


@dataclass(eq=False)
class _Quantized:
    """What a quantizer would make codes of.

    Attributes:
        values: The values, or what a norm or an activation computes them from.
        ready: Them, quantized and ready to be multiplied, for each kind of layer that reads them.
    """

    values: tuple[Any, ...]
    ready: dict[InputKind, Prepared] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Quantizer:
    """A quantizer that native layers read.

    Attributes:
        scales: How many results there are besides the codes.
    """

    scales: int

    def __call__(self, *args: Any) -> list[Any]:
        """Return the values in place of codes, and nothing in place of scales."""
        values, layer = args[:-2], args[-1]
        if len(values) > 1 and not takes(*values[:-1]):
            # The formula, as operations that torch compiles.
            values = (fused.produce(*(*values, layer)),)
        if values[0].dtype not in INPUTS:
            raise ExportError(
                f"{describe_layer(layer)}: no native operator quantizes {values[0].dtype}. {_NEXT}"
            )
        return [_Quantized(values), *(None,) * self.scales]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer; called with its input, the dtype of its result, what is added, and its tensors.

    Attributes:
        traced: The layer.
        kind: Layers of one kind share an input that is ready.
        parts: Which of its tensors it is called with.
    """

    traced: TracedLinear
    kind: InputKind
    parts: tuple[str, ...]

    def __call__(
        self, x: Sequence[Any], dtype: torch.dtype, residual: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        """Return its result."""
        parts: dict[str, Any] = dict(zip(self.parts, tensors, strict=True))
        own = replace(self.traced, **parts)
        given = x[0]
        if isinstance(given, _Quantized):
            if self.kind not in given.ready:
                given.ready[self.kind] = own.prepare(*given.values, own.operand, own.layer)
            return own((given.ready[self.kind],), dtype, residual)
        if not own.operand and given.dtype != dtype:
            raise ExportError(
                f"{describe_layer(own.layer)}: its input is {given.dtype} and its result {dtype}, "
                f"which no native operator computes. {_NEXT}"
            )
        return own(x, dtype, residual)


def _hadamard(x: Tensor, matrix: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return transform(wide, matrix.to(wide.dtype)).to(x.dtype)
