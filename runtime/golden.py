"""The call that is recorded in an artifact, so that whoever loads it can replay it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fpcompiler.artifact import Golden
from fpcompiler.plan import Plan, Symbol
from fpcompiler.runtime.executor import Executor

GOLDEN_SIZE: Final = 16
"""Sizes that may vary are cut to this in the recorded call, to keep artifacts small."""


def record_golden(
    plan: Plan, tensors: Mapping[str, Tensor], batch: tuple[Tensor, ...] | None
) -> tuple[Golden, ...]:
    """Run the program once on a small version of the example call, and keep what it gave.

    Args:
        plan: The program.
        tensors: Its weights, by name.
        batch: The tensors of the example call in the order of the plan; None if there is none.
    """
    if batch is None:
        return ()
    symbols = _free_symbols(plan)
    inputs = tuple(
        _cut(tensor, placeholder.shape, symbols).clone()
        for tensor, placeholder in zip(batch, plan.placeholders, strict=True)
    )
    outputs = Executor(plan, tensors).run_leaves(inputs)
    return (Golden(inputs, tuple(torch.as_tensor(value) for value in outputs)),)


def _cut(tensor: Tensor, shape: tuple[int | str, ...], symbols: Mapping[str, Symbol]) -> Tensor:
    for axis, size in enumerate(shape):
        if isinstance(size, str) and size in symbols:
            least = max(symbols[size].min, GOLDEN_SIZE)
            tensor = tensor.narrow(axis, 0, min(least, tensor.shape[axis]))
    return tensor


def _free_symbols(plan: Plan) -> dict[str, Symbol]:
    """Return the symbols on which no size such as ``2*s0`` depends, which could not be cut too."""
    sizes = {str(size) for placeholder in plan.placeholders for size in placeholder.shape}
    used = {name for size in sizes - {*plan.symbols} for name in re.findall(r"\w+", size)}
    return {name: symbol for name, symbol in plan.symbols.items() if name not in used}
