"""Making an exported graph functional, and made of ``aten`` operators only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from fpcompiler.capture.source import place_in_trace
from fpcompiler.errors import CaptureError

_ATEN_FOR: Final = {
    # What grouped_mm of Hugging Face's expert layers becomes while tracing; in eager mode they
    # call the aten operator themselves.
    "transformers::grouped_mm_fallback": torch.ops.aten._grouped_mm.default,
}
"""Operators of other libraries, and the aten operator with the same arguments and result."""


def functional(exported: ExportedProgram) -> tuple[ExportedProgram, list[str]]:
    """Return the program without mutation, and notes on what that changes.

    ``run_decompositions`` doubles the time of a capture, so it runs only if some operator mutates
    or is replaced; and with an empty table, because the default one turns ``aten.linear``
    into matrix products that no pass would recognise.

    Raises:
        CaptureError: If the program changes a parameter, or holds operators that only run with
            another library or that contain graphs of their own.
    """
    if any(_needs_decomposition(node.target) for node in _calls(exported.graph_module)):
        exported = exported.run_decompositions({})
    for node in _calls(exported.graph_module):
        # Not by a decomposition: the shape function of _grouped_mm refuses dtypes that it computes.
        node.target = _ATEN_FOR.get(_name(node.target), node.target)
        _check_operator(node)
    return exported, _drop_input_mutations(exported)


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in module.graph.nodes if node.op == "call_function")


def _name(target: Any) -> str:
    return target._schema.name if isinstance(target, OpOverload) else str(target)


def _needs_decomposition(target: Any) -> bool:
    """Whether an operator mutates, holds a graph, or is replaced (which needs a graph of ours)."""
    if isinstance(target, HigherOrderOperator) or _name(target) in _ATEN_FOR:
        return True
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _check_operator(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, OpOverload) and target.namespace != "aten":
        raise CaptureError(
            f"The model uses the operator {target}, which is not part of PyTorch itself; a "
            f"compiled model must run without the library that defines it.\n{_place(node)}"
            "Fix: replace it by PyTorch functions, or export the model yourself and pass "
            "exported.run_decompositions({operator: function}) to compile()."
        )
    if isinstance(target, HigherOrderOperator):
        raise CaptureError(
            f"The model uses {target}, an operator that holds a graph of its own; these "
            f"cannot be compiled yet.\n{_place(node)}"
            "Fix: compute both branches and choose with torch.where, or unroll the loop."
        )


def _place(node: fx.Node) -> str:
    place = place_in_trace(node.meta.get("stack_trace") or "")
    return f"  at {place}\n" if place else ""


def _drop_input_mutations(exported: ExportedProgram) -> list[str]:
    """Drop writes to the caller's tensors from a functional program; one note for each."""
    signature, graph = exported.graph_signature, exported.graph
    kinds = {spec.target: spec.kind for spec in signature.output_specs}
    for target, kind in kinds.items():
        if kind.name == "PARAMETER_MUTATION":
            raise CaptureError(
                f"The model changes its parameter {target!r} in forward.\nFix: keep values that "
                "change from call to call in a buffer (register_buffer)."
            )
    output = next(iter(reversed(graph.nodes)))
    pairs = list(zip(signature.output_specs, output.args[0], strict=True))
    kept = [pair for pair in pairs if pair[0].kind is not OutputKind.USER_INPUT_MUTATION]
    if len(kept) == len(pairs):
        return []
    signature.output_specs[:] = [spec for spec, _ in kept]
    output.args = (tuple(value for _, value in kept),)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return [
        f"the model changes its argument {target} in place; the compiled model leaves it as it is"
        for target, kind in kinds.items()
        if kind is OutputKind.USER_INPUT_MUTATION
    ]
