"""A program: the MLIR module, the tensors it names, and how far it has been compiled."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch_mlir import ir

from fpcompiler.errors import IRError
from fpcompiler.ir.context import new_context
from fpcompiler.ir.weights import Weights

_STAGE_ATTRIBUTE = "fpq.stage"


class Stage(enum.IntEnum):
    """How far a program has been compiled; passes say which stage they need and which they give."""

    CAPTURED = 0
    """As torch.export gave it."""
    NORMALIZED = 1
    """Without assertions, dropout and copies that no one writes to."""
    QUANTIZED = 2
    """Layers are ``fpq.linear``."""
    LOWERED = 3
    """Layers are ``fpq.scaled_gemm``: kernels are chosen for one target."""

    @property
    def label(self) -> str:
        """The name in lower case."""
        return self.name.lower()


@dataclass
class Program:
    """An MLIR module with the values of its globals.

    Attributes:
        module: The module; it must stay referenced while any of its operations is in use.
        weights: Values of the globals.
    """

    module: ir.Module
    weights: Weights = field(default_factory=Weights)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Make the module's context and an unknown location current."""
        with self.module.context, ir.Location.unknown():
            yield

    @property
    def stage(self) -> Stage:
        """The stage, kept as an attribute of the module so that dumps carry it."""
        attributes = self.module.operation.attributes
        if _STAGE_ATTRIBUTE not in attributes:
            return Stage.CAPTURED
        label = ir.StringAttr(attributes[_STAGE_ATTRIBUTE]).value
        if label.upper() not in Stage.__members__:
            labels = ", ".join(stage.label for stage in Stage)
            raise IRError(f"the module says it is at stage {label!r}; stages: {labels}.")
        return Stage[label.upper()]

    @stage.setter
    def stage(self, stage: Stage) -> None:
        with self.module.context:
            self.module.operation.attributes[_STAGE_ATTRIBUTE] = ir.StringAttr.get(stage.label)

    @property
    def function(self) -> ir.Operation:
        """The function ``main``.

        Raises:
            IRError: If the module has none.
        """
        for op in self.module.body.operations:
            if op.operation.name == "func.func":
                return op.operation
        raise IRError("the module has no function (func.func @main)")

    @property
    def body(self) -> ir.Block:
        """The block of ``main``: a program is one straight line of operations."""
        return self.function.regions[0].blocks[0]

    def operations(self, *names: str) -> list[ir.Operation]:
        """Return the operations of ``main`` in order, or only those with one of the names."""
        every = (op.operation for op in self.body.operations)
        return [op for op in every if not names or op.name in names]

    def verify(self) -> None:
        """Check every operation, ours in full.

        Raises:
            IRError: With the diagnostics, if the module is not valid.
        """
        with self.context():
            try:
                self.module.operation.verify()
            except ir.MLIRError as error:
                raise IRError(describe_diagnostics(error)) from error

    def clone(self) -> Program:
        """Return a copy of the IR that shares the tensors."""
        with self.context():
            module = ir.Module.parse(self.module.operation.get_asm(enable_debug_info=True))
        return Program(module, Weights(dict(self.weights)))


def parse_program(text: str, weights: Weights | None = None) -> Program:
    """Return the program that MLIR text describes, in a context of its own.

    Raises:
        IRError: With the diagnostics, if the text is not valid.
    """
    context = new_context()
    with context, ir.Location.unknown():
        try:
            module = ir.Module.parse(text)
        except ir.MLIRError as error:
            raise IRError(describe_diagnostics(error)) from error
    return Program(module, weights or Weights())


def describe_diagnostics(error: ir.MLIRError) -> str:
    """Return MLIR's diagnostics as lines ``place: message``, with their notes."""
    lines = [error.message]
    for diagnostic in error.error_diagnostics:
        lines.append(f"  {place_text(diagnostic.location)}: {diagnostic.message}")
        lines += [f"    note: {note.message}" for note in diagnostic.notes]
    return "\n".join(lines)


def place_text(location: ir.Location) -> str:
    """Return a location without its ``loc( )``."""
    text = str(location)
    return text[4:-1] if text.startswith("loc(") else text
