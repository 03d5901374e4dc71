"""Archives of ``torch.export`` (``.pt2``) with the operators ``fpc::`` and packed weights.

Weights are uint8 buffers under the names that they have in the model. The operators are registered
in Python, so ``import fpcompiler.runtime.ops`` comes before ``torch.export.load``; nothing of the
compiler and no class of the model is imported. :mod:`fpcompiler.interop.aoti` writes packages that
need no Python of ours at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from fpcompiler.artifact import Artifact
from fpcompiler.interop.formats import Exported
from fpcompiler.interop.output import Sink, new_files
from fpcompiler.interop.program import (
    Function,
    Sizes,
    quiet,
    register_tensors,
    run_steps,
    trace,
)
from fpcompiler.plan import Plan
from fpcompiler.runtime import operators
from fpcompiler.tree import NONE, Spec, flatten, leaf_count, unflatten

__all__ = ["PlanModule", "write"]

_NESTED: Final = ("tuple", "list", "dict", "output")


def write(artifact: Artifact, path: Path) -> Exported:
    """Write an artifact as an archive that ``torch.export.load`` reads.

    The program is called like the model, by position; a result with named entries is a dict. KV
    caches are buffers of the program, which calls update.

    Raises:
        ExportError: If torch.export cannot record the program, or the file cannot be written.
    """
    module = PlanModule(artifact.plan, artifact.tensors)
    sizes = Sizes(artifact.plan)
    with new_files(path) as folder:  # Before the work: it says where a file cannot be written.
        program = trace(module, module.arguments(sizes.tensors), module.arguments(sizes.dims))
        with (folder / path.name).open("wb", buffering=0) as raw, quiet():
            file = Sink(raw)
            torch.export.save(program, file)  # type: ignore[arg-type]  # Any io object will do.
        if file.error is not None:
            raise file.error
    names = [parameter.name for parameter in module.taken]
    facts = {
        "arguments": ", ".join(names),
        "load": "import fpcompiler.runtime.ops; torch.export.load(path).module()",
    }
    return Exported((path,), facts)


@final
class PlanModule(nn.Module):
    """A plan as a module that is called like the model, by position.

    Args:
        plan: The plan.
        tensors: What its constants and states name; they become buffers.
        functions: What runs each step; by default the operators themselves.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        functions: Sequence[Function] | None = None,
    ) -> None:
        super().__init__()
        self.taken = tuple(p for p in plan.signature.parameters if leaf_count(p.spec or NONE))
        self._plan = plan
        self._functions = functions or [operators.resolve(step.op) for step in plan.steps]
        keys = {**plan.constants, **plan.state}
        paths = register_tensors(self, keys.values(), tensors)
        self._paths = {name: paths[key] for name, key in keys.items()}

        # torch.export reads the names of arguments from the signature, which a method has one of.
        def forward(*args: Any) -> Any:
            return self._run(args)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = [inspect.Parameter(parameter.name, kind) for parameter in self.taken]
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        self.forward = forward

    def arguments(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Return the arguments of a call, with the leaves in place of tensors."""
        remaining, args = list(leaves), []
        for parameter in self.taken:
            spec = _without_constants(parameter.spec or NONE)
            count = leaf_count(spec)
            args.append(_plain(unflatten(spec, remaining[:count])))
            del remaining[:count]
        return tuple(args)

    def _run(self, args: Sequence[Any]) -> Any:
        leaves: list[Tensor] = []
        for parameter, value in zip(self.taken, args, strict=True):
            spec = _without_constants(parameter.spec or NONE)
            leaves += flatten(spec, value, f"argument {parameter.name!r}")
        values: dict[str, Any] = {n: self.get_buffer(path) for n, path in self._paths.items()}
        names = (placeholder.name for placeholder in self._plan.placeholders)
        values.update(zip(names, leaves, strict=True))
        run_steps(self._plan, self._functions, values)
        outputs = [values[o] if isinstance(o, str) else o for o in self._plan.outputs]
        for value, state in self._plan.stores:
            self.get_buffer(self._paths[state]).copy_(values[value])
        return _plain(unflatten(self._plan.signature.outputs, outputs))


def _without_constants(spec: Spec) -> Spec:
    """Return the nesting with None in place of constants, which the program does not read."""
    if spec["t"] == "const":
        return NONE
    if spec["t"] not in _NESTED:
        return spec
    return {**spec, "c": [_without_constants(child) for child in spec["c"]]}


def _plain(value: Any) -> Any:
    """Return a nested value with dicts in place of our results: no archive can name the class."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    return value
