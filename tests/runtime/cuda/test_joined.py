"""Layers that are multiplied as one, with stand-ins for kernels that compute on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.artifact import Artifact
from fpcompiler.artifact.kernels import LayerKernels, TargetKernels
from fpcompiler.numerics import dequantize, unpack
from fpcompiler.runtime.compiled_rest import own_code
from fpcompiler.runtime.cuda import kernels as module
from fpcompiler.runtime.cuda.form import CudaInput
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.joined import CudaPart
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.layers import CudaLayer, CudaLinear, Gemm, Machine
from fpcompiler.runtime.cuda.quantizers import QuantizeKernels
from fpcompiler.runtime.executor import Executor
from tests.runtime.cuda.host_kernels import Kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

SCHEME = "w=e2m1@row, a=e2m3@token"
OPERANDS = "f4E2M1FN@row:f32", "f6E2M3FN@token:f32"
MX = "f4E2M1FN@block32:f8E8M0FNU", "f6E2M3FN@block32:f8E8M0FNU"
LAYERS = "q", "k", "v", "o", "gate", "up"


class Block(nn.Module):
    """Three layers read one input, two another one, and one has its own."""

    def __init__(self, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(64, size, bias) for size, bias in zip((40, 24, 9), biases, strict=True)
        )
        self.o = nn.Linear(40, 64)
        self.gate, self.up = nn.Linear(64, 33), nn.Linear(64, 33)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = self.o(q * k[..., 5:6] + v[..., 8:9])
        return y, self.gate(y) * self.up(y)


def artifact_of(model: nn.Module, operands: tuple[str, str] = OPERANDS) -> Artifact:
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    scheme = "w={},a={}".format(*operands)
    return fpcompiler.compile(model.eval(), scheme, example_inputs=(x,)).artifact


def executor_of(artifact: Artifact, kernels: CudaKernels) -> Executor:
    return Executor(artifact.plan, artifact.tensors, kernels=kernels)


def functions(executor: Executor) -> dict[str, object]:
    return {i.step.layer: i.function for i in executor._code if i.step.op == "fpc.linear"}


@pytest.mark.parametrize(("arch", "operands"), [("sm_90a", OPERANDS), ("sm_100a", MX)])
def test_what_is_joined_gives_the_same_bits(
    arch: str, operands: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(Block(), operands)
    stand_ins = Kernels(tmp_path, *operands, arch)
    kernels = stand_ins.open(*LAYERS)
    joined = executor_of(artifact, kernels)
    found = functions(joined)
    parts = {name: f for name, f in found.items() if isinstance(f, CudaPart)}
    assert {*found} - {*parts} == {"o"}
    assert isinstance(found["o"], CudaLayer)
    assert [parts[name].first for name in ("q", "k", "v", "gate", "up")] == [0, 40, 64, 0, 33]
    assert len({id(part.linear) for part in parts.values()}) == 2

    monkeypatch.setattr(module, "joinable", lambda *_: ())
    single = executor_of(artifact, kernels)
    assert all(isinstance(f, CudaLayer) for f in functions(single).values())
    for rows in (5, 1, 40):
        x = torch.randn(rows, 64) if artifact.plan.symbols else torch.randn(5, 64)
        before = stand_ins.calls("decode") + stand_ins.calls("prefill")
        expected = single.run_leaves([x])
        middle = stand_ins.calls("decode") + stand_ins.calls("prefill")
        assert all(map(torch.equal, expected, joined.run_leaves([x])))
        after = stand_ins.calls("decode") + stand_ins.calls("prefill")
        assert (middle - before, after - middle) == (6, 3)


def test_every_layer_is_seen_with_its_own_output(tmp_path: Path) -> None:
    artifact = artifact_of(Block())
    seen: dict[str, tuple[int, ...]] = {}
    executor = executor_of(artifact, Kernels(tmp_path, *OPERANDS, "sm_90a").open(*LAYERS))
    executor.observed(lambda step, y: seen.update({step.layer: tuple(y.shape)}), torch.randn(5, 64))
    assert [seen[name][-1] for name in LAYERS] == [40, 24, 9, 64, 33, 33]


def test_layers_without_bias_stand_apart_from_those_with_one(tmp_path: Path) -> None:
    artifact = artifact_of(Block((False, True, False)))
    kernels = Kernels(tmp_path, *OPERANDS, "sm_90a").open(*LAYERS)
    found = functions(executor_of(artifact, kernels))
    parts = [name for name in LAYERS if isinstance(found[name], CudaPart)]
    assert parts == ["q", "v", "gate", "up"]
    x = torch.randn(5, 64)
    plain = Executor(artifact.plan, artifact.tensors).run_leaves([x])
    fast = executor_of(artifact, kernels).run_leaves([x])
    for e, f in zip(plain, fast, strict=True):
        assert (e - f).norm() <= 0.02 * e.norm()


def test_outputs_of_the_model_are_whole_tensors(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 24), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q(x), self.k(x)

    artifact = artifact_of(Heads())
    executor = executor_of(artifact, Kernels(tmp_path, *OPERANDS, "sm_90a").open("q", "k"))
    assert all(isinstance(f, CudaLayer) for f in functions(executor).values())
    assert all(y.is_contiguous() for y in executor.run_leaves([torch.randn(5, 64)]))


class Weights(CudaLinear):
    """A layer of packed weights that computes on the CPU, from the weights it was given."""

    calls: ClassVar[list[str]] = []

    def __init__(self, gemms: Any, machine: Machine, w: Any, bias: Any, *rest: Any) -> None:
        super().__init__(gemms, machine, w, bias, *rest)
        _, w_operand, k, *_ = rest
        values = dequantize(unpack(w[0], 4, k), w[1:], w_operand, torch.float32)
        self.given = values, bias

    def multiply(self, x: CudaInput, residual: Tensor | None = None) -> Tensor:
        self.calls.append(self.layer)
        values, bias = self.given
        rows = x.codes.view(torch.bfloat16)[:, : values.shape[1]].float()
        y = rows @ values.T + (0 if bias is None else bias.float())
        return y.bfloat16().view(*x.shape, -1)


class Unquantized(Block):
    """Three layers read the result of one operation; two that of another one, with a residual."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 0.5
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = torch.tanh(self.o(q * k[..., 5:6] + v[..., 8:9]))
        return y + 1, self.gate(y) * self.up(y)


@pytest.mark.parametrize("biases", [(True, True, True), (False, True, True)])
def test_inputs_that_are_not_quantized_are_shared_where_they_are_made(
    biases: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Unquantized(biases).bfloat16().eval(), torch.randn(5, 64).bfloat16()
    weight = "f4E2M1FN@block32:f8E8M0FNU"
    artifact = fpcompiler.compile(model, f"w={weight}", example_inputs=(x,)).artifact
    gemm = Gemm(0, "bf16", "f4E2M1FN", "block32:f8E8M0FNU", torch.bfloat16, "none", Mode.BF16)
    rows = {layer: LayerKernels({"decode": "gemm"}) for layer in LAYERS}
    target = TargetKernels("sm_90a", ("9.0",), {}, {}, rows)
    machine = Machine(torch.device("cpu"), 132)
    monkeypatch.setattr(module, "CudaLinear", Weights)
    monkeypatch.setattr(Weights, "calls", [])
    kernels = CudaKernels(target, {"gemm": gemm}, QuantizeKernels.of([]), machine)
    joined = executor_of(artifact, kernels)
    found = functions(joined)
    first = ["q", "k", "v"] if all(biases) else ["k", "v"]
    # Somebody else reads what gate and up read.
    assert [name for name in LAYERS if isinstance(found[name], CudaPart)] == first
    y = joined.run_leaves([x])
    others = [name for name in LAYERS if name not in first]
    assert sorted(Weights.calls) == sorted([*others, ", ".join(first)])
    monkeypatch.setattr(module, "joinable", lambda *_: ())
    for a, b in zip(y, executor_of(artifact, kernels).run_leaves([x]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(y, Executor(artifact.plan, artifact.tensors).run_leaves([x]), strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
    seen: dict[str, int] = {}
    joined.observed(lambda step, y: seen.update({step.layer: y.shape[-1]}), x)
    assert [seen[name] for name in LAYERS] == [40, 24, 9, 64, 33, 33]


@pytest.mark.parametrize("same", [True, False])
def test_a_scale_of_the_whole_weight_must_be_the_same(same: bool, tmp_path: Path) -> None:
    operands = "f4E2M1FN@tensor:f32/block16:f8E4M3FN", "f4E2M1FN@tensor:f32/block16:f8E4M3FN"
    model = Block()
    with torch.no_grad():
        model.up.weight.copy_(model.gate.weight.flip(0))
        model.up.weight[0, 0] *= 1 if same else 9
    artifact = artifact_of(model, operands)
    found = functions(executor_of(artifact, Kernels(tmp_path, *operands, "sm_100a").open(*LAYERS)))
    assert isinstance(found["up"], CudaPart) == same


def test_torch_compile_traces_one_product(tmp_path: Path) -> None:
    artifact = artifact_of(Block())
    executor = executor_of(artifact, Kernels(tmp_path, *OPERANDS, "sm_90a").open(*LAYERS))
    targets: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    run = torch.compile(own_code(executor.run_leaves), backend=backend, fullgraph=True)
    x = torch.randn(5, 64)
    assert all(map(torch.equal, executor.run_leaves([x]), run([x])))
    assert targets.count(torch.ops.fpc_cuda.gemm) == 3
