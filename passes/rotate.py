"""``rotate``: spread outliers over blocks of channels with a Hadamard transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from fpcompiler.calibration import Group, input_groups
from fpcompiler.errors import PassError
from fpcompiler.ir.dialect import HadamardOp
from fpcompiler.ir.program import Program, Stage
from fpcompiler.numerics.hadamard import HADAMARD_BLOCKS, hadamard
from fpcompiler.passes.base import Pass, PassContext, add_note
from fpcompiler.passes.weights import OpenWeights


@dataclass(frozen=True)
class Rotate(Pass):
    """Transform the input and the weights of layers, which leaves their output as it was.

    ``(x H)(w H)^T = x w^T`` for the block Hadamard matrix ``H`` (QuaRot, arXiv 2404.00456; in
    blocks as in MR-GPTQ, arXiv 2509.23202). Weights are transformed here, the input at each call,
    once for layers that share it. Where the number of channels is no multiple of the block, the
    largest smaller block that fits is taken. It needs no data, and so does not check whether a
    layer gets better: with inputs that are even already it can get a little worse.

    Attributes:
        block: Channels in a block: 16, 32, 64 or 128.
        weights_too: Whether layers whose input is not quantized are transformed as well: it costs
            a transform at each call and makes the weights easier to round.
    """

    name: ClassVar[str] = "rotate"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    block: int = 64
    weights_too: bool = False

    def __post_init__(self) -> None:
        """Check the block.

        Raises:
            PassError: If there is no transform of that length.
        """
        if self.block not in HADAMARD_BLOCKS:
            sizes = ", ".join(map(str, HADAMARD_BLOCKS))
            raise PassError(f"{self.name}: block must be one of {sizes}, not {self.block}")

    def run(self, program: Program, context: PassContext) -> None:
        """Rotate every group of layers whose weights are all open."""
        groups = input_groups(program)
        weights = OpenWeights(program, groups)
        weights.require_unsearched(self.name, groups)
        for group in context.progress(groups, len(groups), "rotating"):
            block = self._block(group.k)
            wanted = group.quantize is not None or self.weights_too
            if not block or not wanted or not weights.are_whole(group):
                context.count("groups of layers not rotated")
                continue
            _rotate(group, weights, block)
            context.count(f"groups of layers rotated in blocks of {block}")

    def _block(self, k: int) -> int:
        """Return the largest block up to the given one that divides ``k``, or 0."""
        return max((b for b in HADAMARD_BLOCKS if b <= self.block and k % b == 0), default=0)


def _rotate(group: Group, weights: OpenWeights, block: int) -> None:
    for weight in weights.of(group):
        rotated = hadamard(weights.value(weight), block, layer=weight.layer)
        weights.replace(weight, rotated, "rotated")
    readers = [group.quantize] if group.quantize is not None else list(group.layers)
    with ir.InsertionPoint(readers[0]), readers[0].location:
        size = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), block)
        x = HadamardOp(group.x, size, group.x.type).result
    for reader in readers:
        reader.operands[0] = x
    for layer in group.layers:
        add_note(layer, f"input and weight rotated in blocks of {block}")
