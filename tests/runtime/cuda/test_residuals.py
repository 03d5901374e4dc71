"""Layers that add a residual on kernels, with stand-ins for kernels that compute on the CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.artifact import Artifact
from fpcompiler.artifact.kernels import DECODE_ROWS
from fpcompiler.errors import NumericsError
from fpcompiler.numerics import pack, quantize
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.layers import CudaLinear
from tests.runtime.cuda.host_kernels import CPU, Kernels
from tests.runtime.cuda.test_kernels import MX, ROW, artifact_of, assert_near, executors, input_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def adding(artifact: Artifact) -> Artifact:
    """Return the model with the sum behind the first call of ``down`` as part of the layer."""
    steps = list(artifact.plan.steps)
    add = next(i for i, step in enumerate(steps) if step.op == "aten.add.Tensor")
    layer, residual = steps[add - 1], steps[add].args[1]
    assert (layer.op, layer.layer, steps[add].args[0]) == ("fpc.linear", "down", {"v": "d0"})
    fused = replace(layer, args=(*layer.args, "", residual), outs=steps[add].outs)
    steps[add - 1 : add + 1] = [fused]
    return replace(artifact, plan=replace(artifact.plan, steps=tuple(steps)))


@pytest.mark.parametrize("residual", [True, False], ids=["in the kernel", "by torch"])
@pytest.mark.parametrize("width", [48, 50], ids=["whole rows", "padded rows"])
def test_a_layer_adds_its_residual(residual: bool, width: int, tmp_path: Path) -> None:
    """And where it has none, or its own output is looked at, adds nothing."""
    weight, activation = MX, "f6E2M3FN@block32:f8E8M0FNU"
    artifact = adding(artifact_of(weight, activation, width))
    made = Kernels(tmp_path, weight, activation, "sm_100a", residual=residual)
    plain, fast = executors(artifact, made.open("down"))
    for rows in (1, 3, DECODE_ROWS + 2, 0):
        x = input_of(rows, width)
        assert_near(plain.run_leaves([x]), fast.run_leaves([x]))
    seen: list[list[Tensor]] = []
    for executor in (plain, fast):
        found: list[Tensor] = []
        executor.run_leaves([x := input_of(4, width)], lambda step, y, to=found: to.append(y))
        seen.append(found)
    assert_near(*seen)
    assert_near(plain.run_leaves([x]), fast.run_leaves([x]))


def test_a_kernel_adds_before_it_rounds(tmp_path: Path) -> None:
    weight, activation = (Operand.parse(text) for text in (ROW, "f6E2M3FN@token:f32"))
    codes, scales = quantize(input_of(64, 128), weight)
    w = [pack(codes, 4), *scales]
    x, residual = input_of(5, 128), input_of(5, 64).bfloat16() * 3
    parts = quantize(x, activation)
    found = {}
    for output in (torch.float32, torch.bfloat16):
        short = {torch.float32: "f32", torch.bfloat16: "bf16"}[output]
        (tmp_path / short).mkdir()
        made = Kernels(tmp_path / short, ROW, "f6E2M3FN@token:f32", "sm_90a", short, residual=True)
        linear = CudaLinear(
            made.open("up").gemms, CPU, w, None, activation, weight, 128, output, "up"
        )
        ready = linear.prepare_codes([parts[0], *parts[1]])
        found[output] = linear.multiply(ready, residual.to(output))
        with pytest.raises(NumericsError, match=r"layer 'up': a residual of .* cannot be added"):
            linear.multiply(ready, residual[:1].to(output))
    assert torch.equal(found[torch.bfloat16], found[torch.float32].bfloat16())
