"""What is raised when quantizers have flagged NaN or infinity, after a run or inside of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics.scaling import not_finite
from fpcompiler.operand import Operand
from fpcompiler.plan import Step
from fpcompiler.runtime.cuda.flags import Flags, is_capturing

CHECKED: Final = "(Tensor x, Tensor[] flags, str[] operands, str[] layers) -> Tensor"
"""A copy of ``x``, if no quantizer has set its flag, int32 ``[1]``."""


@dataclass(frozen=True)
class Check:
    """What quantizers are, in the order of their flags.

    Attributes:
        operands: What each quantizes to.
        layers: The layer that each is for.
    """

    operands: tuple[str, ...]
    layers: tuple[str, ...]

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Check:
        """Return the check of some steps of a plan, all quantizers."""
        return cls(tuple(str(s.args[-2]) for s in steps), tuple(str(s.args[-1]) for s in steps))

    def __call__(self, flags: Tensor) -> None:
        """Wait for quantizers that have run.

        Raises:
            NumericsError: If one has met NaN or infinity. Flags are 0 then.
        """
        # In a graph that is captured nothing has run yet, and nothing may be waited for.
        if not self.layers or is_capturing(flags.device):
            return
        found = flags.tolist()
        if any(found):
            flags.zero_()
            place = found.index(1)
            raise not_finite(Operand.parse(self.operands[place]), self.layers[place])

    def traced(self, x: Tensor, flags: Flags) -> Tensor:
        """Return a tensor that is there only if the check passes, where torch.compile traces."""
        parts = [flags.part(place) for place in range(len(self.layers))]
        checked: Tensor = torch.ops.fpc.checked(x, parts, self.operands, self.layers)
        return checked


def _checked(
    x: Tensor, flags: Sequence[Tensor], operands: Sequence[str], layers: Sequence[str]
) -> Tensor:
    try:
        Check(tuple(operands), tuple(layers))(torch.cat(list(flags)))
    except NumericsError:
        for flag in flags:
            flag.zero_()
        raise
    return x.clone()


def _fake_checked(
    x: Tensor, flags: Sequence[Tensor], operands: Sequence[str], layers: Sequence[str]
) -> Tensor:
    return torch.empty_like(x)


# It waits for the GPU, which no graph of CUDA may hold.
torch.library.define("fpc::checked", CHECKED, tags=(torch.Tag.cudagraph_unsafe,))
torch.library.impl("fpc::checked", "default", _checked)
torch.library.register_fake("fpc::checked", _fake_checked)
