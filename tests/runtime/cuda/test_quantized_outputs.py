"""Layers that quantize their output for the next ones, with stand-ins that compute on the CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.artifact import Artifact
from fpcompiler.artifact.kernels import DECODE_ROWS
from fpcompiler.codegen.cutlass.quantized import QuantizedOutput
from fpcompiler.errors import ArtifactError, NumericsError
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda import QuantizeProblem
from fpcompiler.runtime.cuda.layers import CudaLayer, QuantizingLayer
from fpcompiler.runtime.cuda.pairs import output_pairs
from fpcompiler.runtime.executor import Executor
from tests.runtime.cuda.host_kernels import Kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

MX = "f4E2M1FN@row:f32/block32:f8E8M0FNU"
MX4 = "f4E2M1FN@block32:f8E8M0FNU"
CASES = [
    ("sm_120a", MX, "f6E2M3FN@block32:f8E8M0FNU"),
    ("sm_100a", MX4, MX4),
    ("sm_100a", MX, "f8E4M3FN@block32:f8E8M0FNU"),
]


class Block(nn.Module):
    """Layers with an activation between them, one whose output two layers read, and a head."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle = nn.Linear(64, hidden), nn.Linear(hidden, 128)
        self.a, self.b = nn.Linear(128, 48), nn.Linear(128, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(nn.functional.gelu(self.up(x)))
        result: Tensor = self.a(x) * self.b(x)
        return result


def compiled(weight: str, activation: str, module: nn.Module | None = None) -> Artifact:
    example = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = (module or Block()).eval().bfloat16()
    scheme = f"w={weight},a={activation},skip=none"
    return fpcompiler.compile(model, scheme, example_inputs=(example,), target="reference").artifact


def kernels(folder: Path, case: tuple[str, str, str], quantized: QuantizedOutput | None) -> Kernels:
    arch, weight, activation = case
    operand = Operand.parse(activation)
    quantizers = [
        QuantizeProblem(operand, "bf16", producer, swizzled=True) for producer in ("", "gelu")
    ]
    folder.mkdir()
    return Kernels(folder, weight, activation, arch, "bf16", quantizers, quantized=quantized)


LAYERS = ("up", "middle", "a", "b")


def made(executor: Executor) -> list[str]:
    """Return the layers that quantize their output."""
    code = executor._code
    return [i.step.layer for i in code if isinstance(i.function, QuantizingLayer)]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize(("producer", "layers"), [("gelu", ["up"]), ("", ["middle"])])
def test_results_are_those_of_two_steps(
    case: tuple[str, str, str], producer: str, layers: list[str], tmp_path: Path
) -> None:
    """Bit for bit: what the quantizer of a stored output gives is what the GEMM gives."""
    artifact = compiled(*case[1:])
    quantized = QuantizedOutput(str(Operand.parse(case[2])), producer)
    one = kernels(tmp_path / "one", case, quantized)
    two = kernels(tmp_path / "two", case, None)
    pair, single = (
        Executor(artifact.plan, artifact.tensors, kernels=each.open(*LAYERS)) for each in (one, two)
    )
    assert made(pair) == layers
    assert not made(single)
    for rows in (1, 3, DECODE_ROWS, DECODE_ROWS + 2):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
        assert all(map(torch.equal, pair.run_leaves([x]), single.run_leaves([x])))
    assert one.calls("decode-quantized") == 3
    assert one.calls("prefill-quantized") == 1


def test_whoever_looks_at_results_gets_those_of_the_plan(tmp_path: Path) -> None:
    case = CASES[0]
    artifact = compiled(*case[1:])
    quantized = QuantizedOutput(str(Operand.parse(case[2])), "gelu")
    made_of = kernels(tmp_path / "one", case, quantized).open(*LAYERS)
    pair = Executor(artifact.plan, artifact.tensors, kernels=made_of)
    x = torch.randn(5, 64).bfloat16()
    seen: dict[str, Tensor] = {}
    found = pair.run_leaves([x], lambda step, y: seen.update({step.layer: y}))
    assert {name: tuple(y.shape) for name, y in seen.items() if name in LAYERS} == {
        "up": (5, 256), "middle": (5, 128), "a": (5, 48), "b": (5, 48),
    }  # fmt: skip
    assert all(map(torch.equal, found, pair.run_leaves([x])))


def test_values_that_are_no_numbers_are_refused_with_the_layer(tmp_path: Path) -> None:
    case = CASES[0]
    artifact = compiled(*case[1:])
    bias = artifact.tensors["up.bias"].clone()
    bias[7] = float("inf")
    quantized = QuantizedOutput(str(Operand.parse(case[2])), "gelu")
    opened = kernels(tmp_path / "one", case, quantized).open(*LAYERS)
    pair = Executor(artifact.plan, {**artifact.tensors, "up.bias": bias}, kernels=opened)
    with pytest.raises(NumericsError, match="middle"):
        pair.run_leaves([torch.ones(2, 64).bfloat16()])


def test_an_output_that_is_read_elsewhere_or_is_no_whole_row_stays(tmp_path: Path) -> None:
    class Shown(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.up(x)
            return self.middle(nn.functional.gelu(h)), h

    case = CASES[0]
    quantized = QuantizedOutput(str(Operand.parse(case[2])), "gelu")
    opened = kernels(tmp_path / "one", case, quantized).open(*LAYERS)
    for module in (Shown(), Block(hidden=160)):
        artifact = compiled(*case[1:], module=module)
        executor = Executor(artifact.plan, artifact.tensors, kernels=opened)
        assert not made(executor)
        assert any(isinstance(i.function, CudaLayer) for i in executor._code)


def test_pairs_are_found_in_the_plan_alone() -> None:
    artifact = compiled(*CASES[0][1:])
    steps = artifact.plan.steps
    quantizers = {i: i + 1 for i, s in enumerate(steps) if s.op.endswith("quantize")}
    found = output_pairs(artifact.plan, quantizers)
    assert {steps[i].layer: steps[q].op for i, q in found.items()} == {
        "up": "fpc.fused_quantize", "middle": "fpc.quantize",
    }  # fmt: skip


def test_kernels_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    case = CASES[0]
    artifact = compiled(*case[1:])
    quantized = QuantizedOutput(str(Operand.parse(case[2])), "gelu")
    own = kernels(tmp_path / "one", case, quantized)
    old = own.instances["decode-quantized"]
    own.instances["decode-quantized"] = replace(old, problem={**old.problem, "residual": True})
    with pytest.raises(ArtifactError, match="those that quantize its output compute something"):
        Executor(artifact.plan, artifact.tensors, kernels=own.open("up"))
