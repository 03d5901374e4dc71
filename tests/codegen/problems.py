"""Problems that the tests of code generation share."""

from __future__ import annotations

from fpcompiler.codegen.cutlass.instance import Instance, instances
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Epilogue, GemmProblem, OutputType, Rows
from fpcompiler.operand import Operand

NVFP4 = ("e2m1@tensor:f32/block16:e4m3", "e2m1@tensor:f32/block16:e4m3")
MXFP4 = ("e2m1@block32:e8m0", "e2m1@block32:e8m0")
W4A6 = ("e2m1@row:f32/block32:e8m0", "e2m3@block32:e8m0")
W4A8 = ("e2m1@row:f32/block32:e8m0", "e4m3@block32:e8m0")
W4A6_ROW = ("e2m1@row:f32", "e2m3@token:f32")
E3M0 = ("e3m0@block32:e8m0", "e3m2@block32:e8m0")


def problem(
    pair: tuple[str, str],
    arch: str,
    rows: Rows = Rows.PREFILL,
    epilogue: Epilogue | None = None,
    output: OutputType = OutputType.BF16,
    shape: tuple[int, int] = (4096, 4096),
) -> GemmProblem:
    """Return the problem of a layer ``mlp.up`` with a pair of operands."""
    weight, activation = map(Operand.parse, pair)
    return legalize(
        "mlp.up", weight, activation, shape, arch, rows=rows, epilogue=epilogue, output=output
    )


def instance_of(layer: GemmProblem) -> Instance:
    """Return the instance of a problem with the rule's first tile."""
    return instances(layer)[0]
