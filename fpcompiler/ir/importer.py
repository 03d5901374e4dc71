"""ExportedProgram to MLIR, the weights left outside as ``ml_program.global`` symbols."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch_mlir import ir
from torch_mlir.extras.fx_importer import (
    ContextCache,
    FxImporter,
    FxImporterHooks,
    GraphNodeImporter,
    InputInfo,
)

from fpcompiler.errors import CaptureError
from fpcompiler.ir.build import declare_global, load_global, store_global, torch_global_text
from fpcompiler.ir.context import new_context
from fpcompiler.ir.locations import node_location
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.weights import Weights


class _NamedLocations(ContextCache):  # type: ignore[misc]
    """Gives operations our locations instead of a chain of call sites inside torch."""

    __slots__: tuple[str, ...] = ()

    def get_node_location(self, node: torch.fx.Node) -> ir.Location | None:
        return None if node.op == "output" else node_location(node, self._c)


class _ExternalWeights(FxImporterHooks):  # type: ignore[misc]
    """Declares a global for every parameter, buffer and constant, and keeps its value aside."""

    def __init__(self) -> None:
        self.weights = Weights()
        self.module_op: ir.Operation | None = None
        self._names: dict[int, str] = {}

    def prepare_module(self, module_op: ir.Operation) -> None:
        self.module_op = module_op

    def resolve_input(
        self, importer: GraphNodeImporter, value: Any, info: InputInfo
    ) -> ir.Value | None:
        mutated = info.input_spec.target in info.program.graph_signature.buffers_to_mutate.values()
        return self._load(info.input_spec.target, value, info.ir_type, mutated)

    def resolve_literal(
        self, importer: GraphNodeImporter, literal: Any, info: InputInfo | None
    ) -> ir.Value | None:
        # Scalars read better as dense<..>; the importer turns booleans into ui8 before it asks.
        if not isinstance(literal, torch.Tensor) or literal.numel() <= 1:
            return None
        name = self._names.get(id(literal)) or self.weights.unused_name("constant")
        return self._load(name, literal, importer._cc.tensor_to_vtensor_type(literal), False)

    def store_produced_value(
        self, importer: GraphNodeImporter, value: Any, produced: ir.Value, info: InputInfo
    ) -> None:
        self._declare(info.input_spec.target, value, True)
        store_global(info.input_spec.target, produced, torch_global_text(value))

    def _load(self, name: str, value: torch.Tensor, kind: ir.Type, mutable: bool) -> ir.Value:
        self._declare(name, value, mutable)
        return load_global(name, torch_global_text(value), kind)

    def _declare(self, name: str, value: torch.Tensor, mutable: bool) -> None:
        if name in self.weights:
            return
        assert self.module_op is not None
        self.weights[name] = value
        # The importer does not hold on to literals: keep the object so that its id stays its own.
        self._names[id(value)] = name
        declare_global(self.module_op, name, torch_global_text(value), mutable=mutable)


class _Importer(FxImporter):  # type: ignore[misc]
    """The importer of torch-mlir with our locations and weights."""

    def __init__(self, context: ir.Context, hooks: _ExternalWeights) -> None:
        super().__init__(context=context, hooks=hooks)
        self._cc = _NamedLocations(context, py_attr_tracker=self._py_attr_tracker)


def import_program(exported: ExportedProgram) -> Program:
    """Return a functional ExportedProgram as a program at stage ``captured``.

    Parameters, buffers and constant tensors become globals named as in the program; the tensors
    are shared, not copied. Buffers that the program mutates become mutable globals.

    Raises:
        CaptureError: If the graph holds something that the torch dialect cannot express.
    """
    context = new_context()
    hooks = _ExternalWeights()
    with context, ir.Location.unknown():
        importer = _Importer(context, hooks)
        try:
            importer.import_program(exported, func_name="main")
        except (NotImplementedError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise CaptureError(
                f"The exported graph could not be brought into MLIR: {_first_words(error)}.\n"
                "Fix: look for the operation it names in the model; control flow and sparse "
                "tensors do not compile. Arithmetic on sizes other than + - * // goes away with "
                "fixed sizes (dynamic=None)."
            ) from error
        text = importer.module.operation.get_asm(enable_debug_info=True, use_local_scope=True)
        named = _name_arguments(_anonymous_constants(text), exported.graph_signature.user_inputs)
        program = Program(ir.Module.parse(named), hooks.weights)
    program.stage = Stage.CAPTURED
    program.verify()
    return program


def _first_words(error: Exception) -> str:
    """Return the first line of an importer's error, without addresses and dumps of nodes."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r" at 0x\w+|, \{.*|^FIX ME: ", "", line)


def _anonymous_constants(text: str) -> str:
    """Drop the location of constants: MLIR then names them by value (``%int2``, ``%none``)."""
    return re.sub(r"(= torch\.constant\.[^\n]*?) loc\([^\n]*", r"\1 loc(unknown)", text)


def _name_arguments(text: str, names: Iterable[object]) -> str:
    """Give the arguments of ``main`` the names of the inputs.

    The importer gives them all one location, and the bindings cannot change that of an argument.
    """
    tensors = iter([name for name in names if isinstance(name, str)])
    head, start, rest = text.partition("func.func @main(")
    arguments, end, rest = rest.partition(") -> " if ") -> " in rest else ") {")
    named = re.sub(
        r'(%\w+: [^%]*?) loc\((?:"[^"]*"\("[^"]*"(?:\([^)]*\))?\)|unknown)\)',
        lambda match: f'{match[1]} loc("{next(tensors, "input")}")',
        arguments,
    )
    return head + start + named + end + rest
