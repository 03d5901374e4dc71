"""Checking that a program is right for sizes of 1.

torch.export assumes that a size that varies is at least 2: ``if x.shape[0] == 1`` in the model is
taken to be false, without a guard. Batch 1 is what most people run, so it is not left out but
tested: the model and the graph run once with each size at 1, and all of them at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fpcompiler.capture.call import Call
from fpcompiler.capture.dynamic import Axis
from fpcompiler.capture.model_state import same_buffers
from fpcompiler.capture.program import input_tensors, is_symbolic
from fpcompiler.capture.source import first_line

_TOLERANCE: Final = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error relative to the largest value, 1e-3 for other dtypes: the kernels may differ in
their last bits, while another path through the model's code differs in the first."""


def restrict_to_proven(
    model: nn.Module, call: Call, exported: ExportedProgram, free: Collection[Axis] = ()
) -> list[str]:
    """Make 1 the least size of each symbol, or 2 where model and graph differ at 1.

    Changes ``exported.range_constraints``; returns a note for each symbol that needed it.

    Args:
        model: What was captured.
        call: With what.
        exported: The graph.
        free: Dimensions whose range torch.export found: it says 2 where 1 was not looked at.
    """
    axes = _plain_axes(exported)
    ranges = exported.range_constraints
    least = {symbol: 2 if {*axes[symbol]} & {*free} else 1 for symbol in axes}
    candidates = [symbol for symbol in axes if ranges[symbol].lower <= least[symbol]]
    for symbol in candidates:
        ranges[symbol] = type(ranges[symbol])(1, ranges[symbol].upper)
    trials = [[symbol] for symbol in candidates]
    notes: list[str] = []
    for trial in [*trials, candidates] if len(candidates) > 1 else trials:
        small = [symbol for symbol in trial if ranges[symbol].lower == 1]
        failure = _difference(model, call, exported, [axes[symbol] for symbol in small])
        for symbol in small if failure else []:
            ranges[symbol] = type(ranges[symbol])(2, ranges[symbol].upper)
            leaf, axis = axes[symbol][0]
            notes.append(f"dimension {axis} of {call.leaves[leaf].name} is at least 2: {failure}")
    return notes


def _plain_axes(exported: ExportedProgram) -> dict[Any, list[Axis]]:
    """Return where each symbol is a size of an input; without those that others depend on."""
    axes: dict[Any, list[Axis]] = {}
    derived: set[Any] = set()
    for leaf, (_, value) in enumerate(input_tensors(exported)):
        for axis, size in enumerate(value.shape):
            if not is_symbolic(size):
                continue
            if size.node.expr.is_symbol:
                axes.setdefault(size.node.expr, []).append((leaf, axis))
            else:
                derived |= size.node.expr.free_symbols
    return {symbol: places for symbol, places in axes.items() if symbol not in derived}


def _difference(
    model: nn.Module, call: Call, exported: ExportedProgram, small: Sequence[Sequence[Axis]]
) -> str | None:
    """Say how model and graph differ with the given dimensions cut to size 1, or None."""
    tensors = [leaf.tensor for leaf in call.leaves]
    for leaf, axis in (place for places in small for place in places):
        tensors[leaf] = tensors[leaf].narrow(axis, 0, 1)
    args, kwargs = call.with_tensors(tensors)
    try:
        with same_buffers(model):
            expected = _seeded(lambda: model(*_copies(args), **_copies(kwargs)))
    except Exception as error:  # The model's own code runs here.
        return f"with 1 the model itself fails ({first_line(error)})"
    leaves = pytree.tree_leaves((args, kwargs))
    try:
        got = _seeded(lambda: run_graph(exported, leaves))
    except (RuntimeError, IndexError) as error:
        return f"with 1 the graph fails ({first_line(error)})"
    wanted = pytree.tree_leaves(expected)
    same = len(got) == len(wanted) and all(map(_close, got, wanted))
    return None if same else "with 1 the model takes another path, which the graph does not have"


def run_graph(exported: ExportedProgram, leaves: Sequence[Any]) -> list[Any]:
    """Run a functional graph without the guards of ``exported.module()``; return its results."""
    stored: Mapping[str, Any] = {**exported.constants, **exported.state_dict}
    inputs = iter(leaves)
    values = [
        next(inputs) if spec.kind is InputKind.USER_INPUT else stored[spec.target or spec.arg.name]
        for spec in exported.graph_signature.input_specs
    ]
    results = exported.graph_module(*values)
    specs = exported.graph_signature.output_specs
    pairs = zip(specs, results, strict=True)
    return [value for spec, value in pairs if spec.kind is OutputKind.USER_OUTPUT]


def _seeded(run: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return run()


def _copies(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, arguments)


def _close(value: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
        return type(value) is type(expected) and bool(value == expected)
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(value, expected)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = _TOLERANCE.get(expected.dtype, 1e-3) * scale
    return torch.allclose(value, expected, rtol=0.0, atol=tolerance, equal_nan=True)
