"""State: what it begins as, and values of new tokens that are written in place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpcompiler.artifact.tensors import is_zeros
from fpcompiler.plan import Plan

_INDEX_COPY = "aten.index_copy.default"


@dataclass(frozen=True)
class Initial:
    """What a tensor of the state begins as. Zeros, as of caches, are not copied to the device.

    Attributes:
        value: The tensor, on the CPU.
        device: Where the state is.
    """

    value: Tensor
    device: torch.device
    zeros: bool = field(init=False)

    def __post_init__(self) -> None:
        """See whether it is large and all zeros."""
        object.__setattr__(self, "zeros", is_zeros(self.value))

    def new(self) -> Tensor:
        """Return a tensor of the state's own."""
        if self.zeros:
            return torch.zeros_like(self.value, device=self.device)
        return self.value.to(self.device, copy=True)

    def restore(self, state: Tensor) -> None:
        """Bring it back to what it began as."""
        if self.zeros:
            state.zero_()
        else:
            state.copy_(self.value)


def write_rows(state: Tensor, axis: int, index: Tensor, values: Tensor) -> Tensor:
    """Write ``values`` to ``state`` at places along an axis, and return the state itself."""
    return state.index_copy_(axis, index, values)


def in_place_updates(plan: Plan) -> frozenset[int]:
    """Return the steps that may write to the state itself: nothing reads the state before them.

    ``aten.index_copy`` makes a copy of a whole cache and the end of a run copies it back. Where a
    step is the only one that reads the state, and its result is what the state becomes, a few rows
    are all that has to be written. If a later step fails, the new rows stay.
    """
    becomes = dict(plan.stores)
    uses: dict[str, int] = {}
    for step in plan.steps:
        for name in step.uses():
            uses[name] = uses.get(name, 0) + 1
    kept = {out for out in plan.outputs if isinstance(out, str)} | set(becomes)
    found = set()
    for index, step in enumerate(plan.steps):
        if step.op != _INDEX_COPY or step.kwargs:
            continue
        target = becomes.get(step.outs[0])
        if target is None or step.args[0] != {"v": target}:
            continue
        if uses[target] == 1 and target not in kept:
            found.add(index)
    return frozenset(found)
