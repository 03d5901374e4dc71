"""A call to measure with: the recorded one of an artifact, or one that is made up from its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from fpcompiler.artifact import Golden
from fpcompiler.errors import OptionError
from fpcompiler.plan import Placeholder, Plan
from fpcompiler.runtime.golden import GOLDEN_SIZE
from fpcompiler.runtime.inputs import leaf_names

_COUNTS: Final = 3
"""Integers that have to follow each other for a row to be one of positions."""


def example_call(
    plan: Plan, golden: Sequence[Golden], sizes: Mapping[str, int] | None = None
) -> list[Tensor]:
    """Return the tensors of a call, one per placeholder.

    They are those of the first recorded call. Where a size is to differ, its values are repeated;
    a row of integers that counts up (positions) goes on counting. If no call was recorded, floats
    are random, and integers are random rows of the table if the plan looks them up in one
    (embeddings), otherwise 0.

    Args:
        plan: The program.
        golden: Its recorded calls.
        sizes: Sizes by symbol of the plan, for instance ``{"length": 512}``; the others are as
            recorded, or :data:`GOLDEN_SIZE`.

    Raises:
        OptionError: If there is no such symbol, its range does not hold the size, or a size cannot
            be told.
    """
    sizes = dict(sizes or {})
    _check_sizes(plan, sizes)
    if golden:
        return [
            _resized(tensor, _shape(placeholder, tensor.shape, sizes))
            for placeholder, tensor in zip(plan.placeholders, golden[0].inputs, strict=True)
        ]
    for name, symbol in plan.symbols.items():
        least = max(symbol.min, GOLDEN_SIZE)
        sizes.setdefault(name, least if symbol.max is None else min(least, symbol.max))
    generator = torch.Generator().manual_seed(0)
    return [
        _made_up(plan, placeholder, _shape(placeholder, None, sizes), generator)
        for placeholder in plan.placeholders
    ]


def _check_sizes(plan: Plan, sizes: Mapping[str, int]) -> None:
    places: dict[str, str] = {}
    for name, placeholder in zip(leaf_names(plan.signature), plan.placeholders, strict=True):
        for axis, size in enumerate(placeholder.shape):
            if size in plan.symbols:
                places.setdefault(str(size), f"{size} (axis {axis} of {name})")
    for name, size in sizes.items():
        if name not in plan.symbols:
            known = ", ".join(places.values()) or "none: every shape is fixed"
            raise OptionError(f"The model has no size {name!r} that varies; it has {known}.")
        low, high = plan.symbols[name].min, plan.symbols[name].max
        if size < low or (high is not None and size > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise OptionError(f"The size {name} must be {limits}, not {size}.")


def _shape(
    placeholder: Placeholder, recorded: Sequence[int] | None, sizes: Mapping[str, int]
) -> list[int]:
    shape = []
    for axis, size in enumerate(placeholder.shape):
        if isinstance(size, int) or size in sizes:
            shape.append(size if isinstance(size, int) else sizes[size])
        elif recorded is not None and (size.isidentifier() or not sizes):
            shape.append(recorded[axis])
        else:
            # A size such as 2*s0, which depends on others.
            raise OptionError(
                f"Axis {axis} of the input {placeholder.name!r} has the size {size}, which does "
                "not tell a number. Give the tensors of a call instead of sizes."
            )
    return shape


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        have = tensor.shape[axis]
        if have == 0 and size:
            return tensor.new_zeros(shape)
        if axis == tensor.ndim - 1 and size > have and _counts(tensor):
            tensor = tensor[..., :1] + torch.arange(size, dtype=tensor.dtype)
        elif size != have:
            tensor = tensor.index_select(axis, torch.arange(size) % have)
    return tensor


def _counts(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.shape[-1] < _COUNTS:
        return False
    return bool((tensor.diff(dim=-1) == 1).all())


def _made_up(
    plan: Plan, placeholder: Placeholder, shape: Sequence[int], generator: torch.Generator
) -> Tensor:
    dtype: torch.dtype = getattr(torch, placeholder.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    rows = _table_rows(plan, placeholder.name)
    return torch.randint(max(rows, 1), tuple(shape), generator=generator).to(dtype)


def _table_rows(plan: Plan, name: str) -> int:
    """Return the rows of the embedding that an input selects from; 0 if it selects from none."""
    wanted = {"v": name}
    layers = {
        step.layer
        for step in plan.steps
        if step.op == "aten.embedding.default" and wanted in step.args[1:2]
    }
    return min((row.shape[0] for row in plan.layers if row.name in layers), default=0)
