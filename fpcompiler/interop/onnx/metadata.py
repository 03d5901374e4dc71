"""What a file says of itself: how it is called, what its weights are, and a recorded call."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor

from fpcompiler.artifact import Artifact
from fpcompiler.artifact.tensors import pieces
from fpcompiler.interop.onnx.lower import Lowered
from fpcompiler.interop.onnx.trace import input_names, output_names, state_names
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.onnx_model import (
    GOLDEN_SUFFIX,
    METADATA,
    METADATA_VERSION,
    golden_names,
)
from fpcompiler.runtime.verify import measure_noise

__all__ = ["call_plan", "describe", "golden_file"]

_STEP: Final = "py.onnx"
"""The one step of a plan that says how a file is called."""


def describe(model: ir.Model, artifact: Artifact, style: str, weights: Sequence[Lowered]) -> None:
    """Give a model its property, the names of its sizes, and the first values of its states."""
    ClearMetadataAndDocStringPass()(model)  # The exporter's own name files of this machine.
    _name_sizes(model, artifact.plan)
    _initial_states(model, artifact)
    noise = measure_noise(artifact) if artifact.golden else []
    facts = {
        "version": METADATA_VERSION,
        "style": style,
        "scheme": artifact.scheme,
        "noise_db": [value if math.isfinite(value) else None for value in noise],
        "weights": [asdict(weight) for weight in weights],
        "plan": call_plan(artifact.plan).to_json(),
    }
    model.producer_name, model.graph.name = METADATA, "main"
    model.metadata_props[METADATA] = json.dumps(facts)


def call_plan(plan: Plan) -> Plan:
    """Return a plan whose one step is the whole graph: it says how a file is called."""
    names, states = input_names(plan), state_names(plan)
    placeholders = [
        replace(placeholder, name=name)
        for placeholder, name in zip(plan.placeholders, names, strict=True)
    ]
    results = iter(output_names(plan))
    outputs = [next(results) if isinstance(out, str) else out for out in plan.outputs]
    past, present = [pair[0] for pair in states], [pair[1] for pair in states]
    step = Step(
        _STEP,
        tuple({"v": name} for name in [*names, *past]),
        (*(out for out in outputs if isinstance(out, str)), *present),
    )
    return replace(
        plan,
        placeholders=tuple(placeholders),
        steps=(step,),
        outputs=tuple(outputs),
        constants={},
        state={name: name for name in past},
        stores=tuple((new, old) for old, new in states),
    )


def _name_sizes(model: ir.Model, plan: Plan) -> None:
    """Call the sizes that vary what the plan calls them: the exporter has names of its own."""
    names: dict[str, str] = {}
    for value, placeholder in zip(model.graph.inputs, plan.placeholders, strict=False):
        for size, name in zip(value.shape or (), placeholder.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and size.value and str(name) in plan.symbols:
                names[size.value] = str(name)
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _renamed(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(re.sub(r"\w+", lambda m: names.get(m[0], m[0]), size.value))


def _initial_states(model: ir.Model, artifact: Artifact) -> None:
    """Put the first values of states into the file, where these are not zeros."""
    inputs = {value.name: value for value in model.graph.inputs}
    keys = artifact.plan.state.values()
    for (name, _), key in zip(state_names(artifact.plan), keys, strict=True):
        tensor = artifact.tensors[key]
        if bool(tensor.any()):
            inputs[name].const_value = ir.tensor(tensor.numpy(), name=name)
            model.graph.register_initializer(inputs[name])


def golden_file(path: Path, artifact: Artifact) -> None:
    """Write the recorded calls beside a file, if there are any."""
    named: dict[str, Tensor] = {}
    for index, case in enumerate(artifact.golden):
        given, found = golden_names(index, len(case.inputs), len(case.outputs))
        named.update(zip([*given, *found], [*case.inputs, *case.outputs], strict=True))
    if named:
        with path.with_name(path.name + GOLDEN_SUFFIX).open("wb") as file:
            for piece in pieces(named):
                file.write(piece)
