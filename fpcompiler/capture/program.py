"""A captured program: the exported graph with what the rest of the compiler needs to know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from fpcompiler import tree
from fpcompiler.capture.call import Scalar, parameter
from fpcompiler.capture.dynamic import Axis
from fpcompiler.capture.functional import functional
from fpcompiler.capture.model_state import quiet
from fpcompiler.capture.size_names import symbol_names
from fpcompiler.errors import CaptureError, RunError
from fpcompiler.plan import DTYPES, Parameter, Placeholder, Signature, Symbol

_UNBOUNDED = 2**62
"""torch.export writes "no limit" as infinity or as the largest 64-bit integers."""


@dataclass(frozen=True)
class CapturedProgram:
    """A model as a functional graph.

    Attributes:
        exported: The graph: ``aten`` operators without side effects.
        signature: How the model is called.
        placeholders: The input tensors, in the order of the signature's leaves; named as in the
            graph.
        symbols: Ranges of the sizes that vary, by name; the graph has names of its own for them.
        state: Names of the buffers that a call changes.
        notes: What was decided about the model's sizes and mode, one sentence each.
    """

    exported: ExportedProgram
    signature: Signature
    placeholders: tuple[Placeholder, ...]
    symbols: Mapping[str, Symbol]
    state: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def from_exported(exported: ExportedProgram) -> CapturedProgram:
    """Return the program of a user's ExportedProgram, which is left as it is.

    Parameters are named as in the ``forward`` that was exported, or ``arg_0``, ``arg_1`` if the
    program does not say. Ranges of sizes are those it was exported with.

    Raises:
        CaptureError: If the program cannot be made functional, or has inputs or outputs other than
            tensors and scalars.
    """
    values = _input_values(exported)
    with quiet(), torch.no_grad():
        graph, notes = functional(exported)
    parameters = tuple(parameter(name, value) for name, value in values.items())
    return describe(graph, parameters, {}, notes)


def describe(
    exported: ExportedProgram,
    parameters: tuple[Parameter, ...],
    fixed: Mapping[str, Scalar],
    notes: Iterable[str],
    size_names: Mapping[Axis, str] | None = None,
) -> CapturedProgram:
    """Add placeholders, symbols and the nesting of the result to a functional program.

    Args:
        exported: The program.
        parameters: What it is called with.
        fixed: Arguments that are part of it.
        notes: What was decided.
        size_names: Names for dimensions of inputs; others are made of the inputs' names.
    """
    inputs = input_tensors(exported)
    names = symbol_names(inputs, size_names or {})
    symbols: dict[str, Symbol] = {}
    for _, tensor in inputs:
        for size in filter(is_symbolic, tensor.shape):
            ranges = _ranges(size, exported.range_constraints)
            symbols.update({names.get(symbol, symbol): r for symbol, r in ranges.items()})
    signature = Signature(parameters, _output_spec(exported), fixed)
    leaves = sum(tree.leaf_count(p.spec) for p in parameters if p.spec is not None)
    assert leaves == len(inputs), "torch.export numbers the inputs another way"
    return CapturedProgram(
        exported=exported,
        signature=signature,
        placeholders=tuple(_placeholder(name, tensor, names) for name, tensor in inputs),
        symbols=symbols,
        state=tuple(exported.graph_signature.buffers_to_mutate.values()),
        notes=tuple(notes),
    )


def input_tensors(exported: ExportedProgram) -> list[tuple[str, Tensor]]:
    """Return name and fake tensor of each input tensor of the graph."""
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    inputs = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT or isinstance(spec.arg, ConstantArgument):
            continue
        if not isinstance(spec.arg, TensorArgument):
            raise CaptureError(
                f"The input {spec.arg.name!r} is a number that may vary; a compiled model takes "
                "tensors.\nFix: pass it as a tensor, or export with it as a constant."
            )
        inputs.append((spec.arg.name, values[spec.arg.name]))
    return inputs


def is_symbolic(size: object) -> TypeGuard[SymInt]:
    """Return whether a size varies."""
    return isinstance(size, SymInt)


def _placeholder(name: str, tensor: Tensor, sizes: Mapping[str, str]) -> Placeholder:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CaptureError(
            f"The input {name!r} has the dtype {dtype}; a compiled model takes {', '.join(DTYPES)}."
        )
    shape = tuple(_text(n, sizes) if is_symbolic(n) else int(n) for n in tensor.shape)
    return Placeholder(name, dtype, shape)


def _text(size: SymInt, names: Mapping[str, str]) -> str:
    return re.sub(r"[a-zA-Z_]\w*", lambda match: names.get(match[0], match[0]), str(size))


def _ranges(size: SymInt, ranges: Mapping[Any, Any]) -> dict[str, Symbol]:
    found = {}
    for symbol in size.node.expr.free_symbols:
        least, most = ranges[symbol].lower, ranges[symbol].upper
        found[str(symbol)] = Symbol(int(least), int(most) if most < _UNBOUNDED else None)
    return found


def _input_values(exported: ExportedProgram) -> dict[str, Any]:
    """Return the arguments by name, with an empty tensor for every tensor."""
    leaves = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else torch.empty(0)
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]
    args, kwargs = pytree.tree_unflatten(leaves, exported.call_spec.in_spec)
    root = next(entry for entry in exported.module_call_graph if entry.fqn == "")
    names = root.signature.forward_arg_names if root.signature is not None else None
    if not names or len(names) != len(args) + len(kwargs):
        names = [*(f"arg_{i}" for i in range(len(args))), *kwargs]
    return dict(zip(names, [*args, *kwargs.values()], strict=True))


def _output_spec(exported: ExportedProgram) -> tree.Spec:
    leaves = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else torch.empty(0)
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    result = pytree.tree_unflatten(leaves, exported.call_spec.out_spec)
    try:
        return tree.spec_of(result, "the result")
    except RunError as error:
        raise CaptureError(
            f"The model returns something that a compiled model cannot return: {error}\n"
            "Fix: return tensors, or tuples, lists and dicts of tensors."
        ) from error
