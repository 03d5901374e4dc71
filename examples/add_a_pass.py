"""A pass of your own: look at a program, run the pass in a pipeline, read what it changed.

    python examples/add_a_pass.py [FOLDER FOR THE DUMPS]

The pass gives layers with few outputs 8-bit weights: rounding errors of such layers (routers,
heads, projections to a few channels) reach everything after them, and their weights are small.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import fpcompiler
from fpcompiler.ir import Program, Stage
from fpcompiler.ir.dialect import QuantizeOp
from fpcompiler.ir.types import QuantizedType, quantized_type
from fpcompiler.operand import Operand
from fpcompiler.passes import PASSES, Pass, PassContext, parse_pipeline, rewrite


# The pass: begin
@dataclass(frozen=True)
class WidenSmall(Pass):
    """Store the weights of layers with at most ``outputs`` outputs in 8 bits."""

    name: ClassVar[str] = "widen-small"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    outputs: int = 16

    def run(self, program: Program, context: PassContext) -> None:
        """Replace the quantize of each such weight."""
        small = set()
        for op in program.operations("fpq.linear"):
            weight = quantized_type(op.operands[1])
            if weight.shape[0] <= self.outputs:
                small.add(op.operands[1].owner)
        wide = Operand.parse("f8E4M3FN@row:f32")

        def widen(op):
            if op not in small:
                return None
            kind = QuantizedType(quantized_type(op.results[0]).shape, wide)
            return [QuantizeOp(op.operands[0], kind.to_mlir()).result]

        context.count("weights widened", rewrite(program, ["fpq.quantize"], widen))


# The pass: end

PIPELINE = (
    "cse,normalize,fold-constants,insert-quantize{scheme=w4a6},cse,widen-small{outputs=8},"
    "quantize-weights,lower-gemm,canonicalize,symbol-dce"
)


def build() -> torch.nn.Module:
    """Return a small model whose last layer has four outputs."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 4))


def main(folder: Path) -> None:
    model, x = build(), torch.randn(8, 64)
    pipeline = parse_pipeline(PIPELINE, {**PASSES, WidenSmall.name: WidenSmall})
    compiled = fpcompiler.compile(
        model, "w4a6", example_inputs=(x,), pipeline=pipeline, dump_dir=folder
    )
    print(compiled.plan())
    (diff,) = folder.glob("*-widen-small.diff")
    print(f"\n{diff}:")
    print(diff.read_text())
    plain = fpcompiler.compile(model, "w4a6", example_inputs=(x,))
    for name, one in (("without", plain), ("with", compiled)):
        row = one.compare(model, [x]).rows[-1]
        print(f"{name:>8} the pass: {row.sqnr_db:.2f} dB at the output")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
