"""Which sizes may vary from call to call: a first guess, then what torch.export says about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.export import Dim

from fpcompiler.capture.call import Leaf
from fpcompiler.capture.guards import always_held

Axis: TypeAlias = tuple[int, int]
"""Number of a leaf, and one of its dimensions."""

BATCH: Final = "batch"
LENGTH: Final = "length"

_RANGE: Final = re.compile(r"(min|max)=(\d+)")


@dataclass(frozen=True)
class Sizes:
    """Groups of dimensions that may vary, the sizes within a group being equal.

    Attributes:
        leaves: The example inputs.
        groups: Dimensions by the name of their group.
        ranges: Least and largest size of a group, where they are not 1 and unbounded.
        fixed: Why a dimension that was first in a group no longer is.
        free: Groups whose range torch.export finds itself: it makes guards of them that always
            hold, and does not see that they do.
    """

    leaves: tuple[Leaf, ...]
    groups: Mapping[str, tuple[Axis, ...]]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    fixed: Mapping[Axis, str] = field(default_factory=dict)
    free: frozenset[str] = frozenset()

    def size(self, axis: Axis) -> int:
        """Return the size of a dimension in the example inputs."""
        return self.leaves[axis[0]].tensor.shape[axis[1]]

    def stretched(self) -> list[str]:
        """Return the groups whose example size is 1: traced with another one, batch first."""
        names = [name for name, axes in self.groups.items() if self.size(axes[0]) == 1]
        return sorted(names, key=lambda name: not name.startswith(BATCH))

    def trace_tensors(self) -> list[Tensor]:
        """Return the example tensors with the size 1 of varying dimensions made larger.

        torch.export takes a size of 1 for a constant. Each such group gets a size that no other
        dimension has, so that no accidental equality ends up in the program.
        """
        taken = {size for leaf in self.leaves for size in leaf.tensor.shape}
        tensors = [leaf.tensor for leaf in self.leaves]
        for name in self.stretched():
            size = next(n for n in range(2, len(taken) + 3) if n not in taken)
            taken.add(size)
            for leaf, axis in self.groups[name]:
                tensors[leaf] = torch.cat([tensors[leaf]] * size, axis)
        return tensors

    def dims(self) -> list[dict[int, Any] | None]:
        """Return the ``dynamic_shapes`` entry of each leaf."""
        entries: list[dict[int, Any]] = [{} for _ in self.leaves]
        for name, axes in self.groups.items():
            least, most = self.ranges.get(name, (1, None))
            dim = Dim.AUTO if name in self.free else Dim(name, min=least, max=most)
            for leaf, axis in axes:
                entries[leaf][axis] = dim
        return [entry or None for entry in entries]

    def without(self, names: Iterable[str], reason: str) -> Sizes:
        """Return the sizes with some groups fixed at the example's size."""
        gone = set(names)
        reasons = {axis: reason for name in gone for axis in self.groups[name]}
        kept = {name: axes for name, axes in self.groups.items() if name not in gone}
        return replace(self, groups=kept, fixed={**self.fixed, **reasons})

    def notes(self) -> list[str]:
        """Say which sizes were guessed to vary but are fixed or bounded."""
        notes = [
            f"{self.where(axis)} is fixed at {self.size(axis)}: {reason}"
            for axis, reason in sorted(self.fixed.items())
        ]
        for name, (least, most) in self.ranges.items():
            if name in self.groups:
                bound = f"at most {most}" if most is not None else f"at least {least}"
                notes.append(f"{self.where(self.groups[name][0])} is {bound}: so says the model")
        return notes

    def where(self, axis: Axis) -> str:
        """Return the words for a dimension."""
        return f"dimension {axis[1]} of {self.leaves[axis[0]].name}"


def propose(leaves: Sequence[Leaf]) -> Sizes:
    """Guess which sizes vary: the batch (axis 0), and lengths of sequences.

    A length is axis 1 of token ids, of masks and of 3-D hidden states, and any size equal to such
    a length in a mask or in a vector of positions. Images vary in the batch only.
    """
    tensors = [leaf.tensor for leaf in leaves]
    leading = [t.shape[0] for t in tensors if t.ndim > 1] + [t.shape[0] for t in tensors if t.ndim]
    batch = leading[0] if leading else 0
    lengths = list(dict.fromkeys(t.shape[1] for t in tensors if _is_sequence(t)))
    groups: dict[str, list[Axis]] = {}
    for number, leaf in enumerate(leaves):
        for axis, size in enumerate(leaf.tensor.shape):
            role = _role(leaf, axis, batch, lengths)
            if role is not None and size > 0:
                groups.setdefault(role, []).append((number, axis))
    return Sizes(tuple(leaves), {name: tuple(axes) for name, axes in groups.items()})


def _is_sequence(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return tensor.ndim == 3
    return tensor.ndim == 2


def _role(leaf: Leaf, axis: int, batch: int, lengths: list[int]) -> str | None:
    """Return the group of a dimension: ``batch``, ``length``, ``length2``, ... or None."""
    shape, size = leaf.tensor.shape, leaf.tensor.shape[axis]
    vector = len(shape) == 1
    if axis == 0 and size == batch and not (vector and "position" in leaf.name and lengths):
        return BATCH
    sequence = axis == 1 and _is_sequence(leaf.tensor)
    mask = axis > 0 and "mask" in leaf.name
    if size not in lengths or not (sequence or mask or vector):
        return None
    index = lengths.index(size)
    return LENGTH if index == 0 else f"{LENGTH}{index + 1}"


def refine(sizes: Sizes, message: str) -> Sizes | None:
    """Return the sizes as torch.export's constraint error wants them, or None if it says nothing.

    The error ends with lines such as ``batch = 3`` (one size only), ``length2 = length`` (equal)
    or ``length = Dim('length', max=64)``. A group of several dimensions that allows one size only
    is taken apart first: perhaps just one of them is fixed.
    """
    before, _, fixes = message.partition("Suggested fixes:")
    refined = sizes
    for name, value in re.findall(r"^\s+(\w+) = (.+)$", fixes, re.MULTILINE):
        refined = _apply(refined, name, value.strip()) if name in refined.groups else refined
    if refined is not sizes:
        return refined
    free = sizes.free | ({*always_held(before)} & {*sizes.groups})
    if free != sizes.free:
        return replace(sizes, free=free)
    named = [
        name
        for names in re.findall(r"\(([\w, ]+)\)!", before)
        for name in names.split(", ")
        if name in sizes.groups
    ]
    return sizes.without(named, "the model's code works for this size only") if named else None


def _apply(sizes: Sizes, name: str, value: str) -> Sizes:
    axes = sizes.groups[name]
    others = {key: group for key, group in sizes.groups.items() if key != name}
    if value in others:
        return replace(sizes, groups={**others, value: others[value] + axes})
    if value.startswith("Dim("):
        limits = {key: int(number) for key, number in _RANGE.findall(value)}
        least, most = sizes.ranges.get(name, (1, None))
        limit = (limits.get("min", least), limits.get("max", most))
        if limit != (least, most):
            return replace(sizes, ranges={**sizes.ranges, name: limit})
    elif len(axes) > 1:
        apart = {f"{name}_{i}": (axis,) for i, axis in enumerate(axes)}
        return replace(sizes, groups={**others, **apart})
    return sizes.without([name], "the model's code works for this size only")
