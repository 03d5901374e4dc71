"""Shapes of all values of a captured program in one call: from its symbols, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fpcompiler.capture.program import CapturedProgram, input_tensors, is_symbolic


def shapes_of_call(
    captured: CapturedProgram, leaves: Sequence[Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the graph, by the name of its node.

    Tensors whose size depends on more than the sizes of inputs are left out.

    Args:
        captured: The program.
        leaves: The tensors of a call, in the order of the program.
    """
    symbols = _symbols(captured, leaves)
    found = {}
    for node in captured.exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = [_size(size, symbols) for size in value.shape]
            if None not in sizes:
                found[node.name] = tuple(size for size in sizes if size is not None)
    return found


def _symbols(captured: CapturedProgram, leaves: Sequence[Tensor]) -> dict[Any, int]:
    """Return the size that each symbol stands for; those of expressions alone are not known."""
    found: dict[Any, int] = {}
    for (_, fake), leaf in zip(input_tensors(captured.exported), leaves, strict=True):
        for size, actual in zip(fake.shape, leaf.shape, strict=True):
            if is_symbolic(size) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, actual)
    return found


def _size(size: int | torch.SymInt, symbols: Mapping[Any, int]) -> int | None:
    if not is_symbolic(size):
        return int(size)
    value = size.node.expr.subs(symbols)
    return int(value) if value.is_Integer else None
