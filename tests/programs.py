"""Programs for the tests of the IR and the passes, and how to run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fpcompiler import ir, passes, tree
from fpcompiler.capture import CapturedProgram, capture
from fpcompiler.passes.layers import name_layers
from fpcompiler.runtime.inputs import bind
from tests.models import Call


class Function(nn.Module):
    """A function with parameters by name: ``Function(f, w=...)`` computes ``f(self, x)``."""

    def __init__(self, function: Any, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def program_of(model: nn.Module, *args: Tensor, dynamic: Any = "auto") -> ir.Program:
    """Return a model as a program at stage captured, its layers named as ``compile`` does it."""
    return import_named(capture(model.eval(), args, dynamic=dynamic))


def import_named(captured: CapturedProgram) -> ir.Program:
    """Return a captured program as a program whose layers have names."""
    program = ir.import_program(captured.exported)
    name_layers(program)
    return program


def run_passes(program: ir.Program, pipeline: str) -> tuple[passes.PassResult, ...]:
    """Run the text of a pipeline."""
    return passes.run_pipeline(program, passes.parse_pipeline(pipeline))


def quantized(
    model: nn.Module, *args: Tensor, scheme: str = "w4a6,skip=none", dynamic: Any = "auto"
) -> ir.Program:
    """Return a program at stage quantized, the weights not yet rounded."""
    program = program_of(model, *args, dynamic=dynamic)
    run_passes(program, f'normalize,fold-constants,insert-quantize{{scheme="{scheme}"}},cse')
    return program


def evaluate(program: ir.Program, *inputs: Tensor) -> list[Tensor]:
    """Run a program on tensors."""
    with torch.no_grad():
        return list(ir.raise_to_fx(program)(*inputs))


def with_initial_state(module: fx.GraphModule, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """Give a raised module buffers of its own for what its program mutates."""
    for key, name in module.meta["globals"].items():
        if name in state:
            setattr(module, key, state[name].clone())
    return module


def leaves_of(captured: CapturedProgram, call: Call) -> list[Tensor]:
    """Return the tensors of a call in the order of the program's arguments."""
    args, kwargs = call
    return bind(captured.signature, args, kwargs)


def results_of(captured: CapturedProgram, model: nn.Module, call: Call) -> list[Tensor]:
    """Return what the model itself gives, as the leaves of the program's result."""
    args, kwargs = call
    specs = {p.name: p.spec for p in captured.signature.parameters if p.spec is not None}
    fixed = {name: spec["v"] for name, spec in specs.items() if spec["t"] == "const"}
    fixed |= captured.signature.fixed
    cache = {name: value for name, value in fixed.items() if name == "use_cache"}
    with torch.no_grad():
        return tree.flatten(captured.signature.outputs, model(*args, **cache | kwargs), "result")


def count(program: ir.Program, *names: str) -> int:
    """Return how many operations have one of the names."""
    return len(program.operations(*names))


def kept_reasons(program: ir.Program) -> dict[str, str]:
    """Return why each layer that is kept is kept."""
    return {
        str(op.attributes["fpq.layer"]).strip('"'): str(op.attributes["fpq.kept"]).strip('"')
        for op in program.operations()
        if "fpq.kept" in op.attributes
    }
