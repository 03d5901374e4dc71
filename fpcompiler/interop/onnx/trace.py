"""A plan as an ONNX model in which our four symbols stand for what is quantized."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from fpcompiler.artifact import Artifact
from fpcompiler.errors import ExportError
from fpcompiler.interop.onnx.symbols import resolve
from fpcompiler.interop.program import (
    Sizes,
    near_layer,
    quiet,
    register_tensors,
    run_steps,
    trace,
)
from fpcompiler.plan import Plan
from fpcompiler.runtime.inputs import leaf_names
from fpcompiler.tree import leaf_paths

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BASE_OPSET", "input_names", "output_names", "state_names", "trace_onnx"]

BASE_OPSET: Final = 18
"""What torch's exporter writes without converting: the lowest opset of its operators."""

_OUTPUT: Final = "output"
_NAME: Final = re.compile(r"[a-zA-Z_]\w*")
"""Of a size, in it or in an expression of it."""


def input_names(plan: Plan) -> list[str]:
    """Return the names of a plan's inputs in ONNX, those of the arguments: ``past[0]``."""
    return leaf_names(plan.signature)


def output_names(plan: Plan) -> list[str]:
    """Return the names of its results: ``logits``, ``[0]``; a lone one is ``output``."""
    paths = zip(leaf_paths(plan.signature.outputs), plan.outputs, strict=True)
    # A number that the program gives is part of how it is called, and none of the graph.
    computed = [path for path, out in paths if isinstance(out, str)]
    return [f"{_OUTPUT}{path}" if not path or path[0] == "[" else path for path in computed]


def state_names(plan: Plan) -> list[tuple[str, str]]:
    """Return the names of each state: what a call reads, and what it gives to the next call."""
    return [(f"past.{key}", f"present.{key}") for key in plan.state.values()]


def trace_onnx(artifact: Artifact) -> ir.Model:
    """Return the program of an artifact in ONNX, with symbols of ours; see :mod:`.symbols`.

    States (KV caches) are further inputs and results.

    Raises:
        ExportError: If an operator of the model has no form in ONNX.
    """
    plan, module = artifact.plan, FlatModule(artifact)
    sizes = Sizes(plan)
    states = [artifact.tensors[key] for key in plan.state.values()]
    dims = [*sizes.dims, *({} for _ in states)]
    program = trace(module, (*sizes.tensors, *states), (tuple(dims),))
    past, present = [pair[0] for pair in state_names(plan)], [pair[1] for pair in state_names(plan)]
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                input_names=[*input_names(plan), *past],
                output_names=[*output_names(plan), *present],
                opset_version=BASE_OPSET,
                dynamo=True,
                optimize=True,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _refusal(plan, error) from error
    assert exported is not None
    _name_sizes(exported.model, plan)
    return exported.model


def _name_sizes(model: ir.Model, plan: Plan) -> None:
    """Give the sizes that vary the names that they have in the plan: torch has names of its own."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, placeholder in zip(model.graph.inputs, plan.placeholders, strict=False):
        for dim, size in zip(value.shape or (), placeholder.shape, strict=True):
            own, known = (_NAME.findall(str(text)) for text in (dim, size))
            names.update(zip(own, known, strict=False))

    def renamed(text: str) -> str:
        return _NAME.sub(lambda match: names.get(match[0], match[0]), text)

    results = (value for node in model.graph for value in node.outputs)
    for value in [*model.graph.inputs, *results]:
        if value.shape is not None:
            sizes = (dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape)
            value.shape = ir.Shape(renamed(s) if isinstance(s, str) else s for s in sizes)


def _refusal(plan: Plan, error: Exception) -> ExportError:
    """Return what to say of an error of torch's exporter, which names an operator at best."""
    causes, cause = [str(error)], error.__cause__
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__
    match = re.search(r"OpOverload\(op='\w+\.(\w+)", "\n".join(causes))
    if match is None:
        return ExportError(
            f"torch's ONNX exporter failed: {_first_line(causes[-1])}. Export to pt2, or run the "
            "artifact as it is."
        )
    name = f"aten.{match[1]}"
    steps = [index for index, step in enumerate(plan.steps) if step.op.startswith(f"{name}.")]
    where = near_layer(plan, steps[0]) if steps else "the model"
    return ExportError(
        f"{where}: the operator {name} has no form in ONNX that torch knows. Replace it in the "
        "model by other operations, do it outside of the compiled part, or export to pt2."
    )


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[0].rstrip(".")


@final
class FlatModule(nn.Module):
    """A plan as a module from tensors to tensors: inputs and states in, results and states out.

    Args:
        artifact: The plan, and the tensors that become buffers.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self._plan = artifact.plan
        self._functions = [resolve(step.op) for step in self._plan.steps]
        constants = self._plan.constants
        paths = register_tensors(self, constants.values(), artifact.tensors)
        self._paths = {name: paths[key] for name, key in constants.items()}

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        """Return the results and the new states."""
        plan = self._plan
        values: dict[str, Any] = {n: self.get_buffer(path) for n, path in self._paths.items()}
        names = [*(placeholder.name for placeholder in plan.placeholders), *plan.state]
        values.update(zip(names, leaves, strict=True))
        run_steps(plan, self._functions, values)
        stored = {state: value for value, state in plan.stores}
        states = [stored.get(name, name) for name in plan.state]
        outputs = [values[out] for out in plan.outputs if isinstance(out, str)]
        return (*outputs, *(values[name] for name in states))
