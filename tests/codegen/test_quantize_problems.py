"""Problems of quantizers, found by running a call of a compiled model."""

from __future__ import annotations

import pytest
import torch

import fpcompiler
from fpcompiler.codegen.quantize_problems import quantize_problems
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda import QuantizeProblem
from fpcompiler.runtime.executor import Executor
from tests.models import Llama, token_ids
from tests.plans import mlp_artifact

TOKEN = "f6E2M3FN@token:f32"
ROW = "f4E2M1FN@row:f32"


def test_types_are_those_of_a_call() -> None:
    torch.manual_seed(0)
    inputs = (token_ids(1, 6),)
    model = Llama(layers=1).eval().bfloat16()
    compiled = fpcompiler.compile(model, "w4a6-row", example_inputs=inputs, target="reference")
    artifact = compiled.artifact
    layers = [row.name for row in artifact.plan.layers if row.quantized]
    found = quantize_problems(
        Executor(artifact.plan, artifact.tensors),
        artifact.golden[0].inputs,
        dict.fromkeys(layers, "f8E4M3FN"),
    )
    token = Operand.parse(TOKEN)
    norm = QuantizeProblem(token, "bf16", "rms_norm", ("bf16", "", "", ""), stored="f8E4M3FN")
    gated = QuantizeProblem(token, "bf16", "silu_mul", ("", "", "bf16", ""), stored="f8E4M3FN")
    plain = QuantizeProblem(token, "bf16", stored="f8E4M3FN")
    of_part = {name.rpartition(".")[2]: problem for name, problem in found.layers.items()}
    assert of_part == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), norm),
        "down_proj": gated, "o_proj": plain,
    }  # fmt: skip


NVFP4 = "f4E2M1FN@tensor:f32/block16:f8E4M3FN"
MX = "f6E2M3FN@block32:f8E8M0FNU"


@pytest.mark.parametrize(
    ("weight", "activation", "element", "form"),
    [
        (ROW, TOKEN, "f6E2M3FN", {}),
        (ROW, TOKEN, "f8E4M3FN", {"stored": "f8E4M3FN"}),
        ("f4E2M1FN@block32:f8E8M0FNU", MX, "f6E2M3FN", {"swizzled": True}),
        (NVFP4, NVFP4, "f4E2M1FN", {"swizzled": True}),
        # A wider container with other codes than E4M3's.
        (ROW, "f4E1M2FN@token:f32", "f6E2M3FN", None),
    ],
)
def test_what_no_kernel_makes_is_left_out(
    weight: str, activation: str, element: str, form: dict[str, bool] | None
) -> None:
    artifact = mlp_artifact(weight=weight, activation=activation)
    executor = Executor(artifact.plan, artifact.tensors)
    found = quantize_problems(executor, [torch.ones(2, 64)], {"up": element})
    wanted = {}
    if form is not None:
        wanted["up"] = QuantizeProblem(Operand.parse(activation), "f32", **form)
    assert found.layers == wanted
    assert found.codes == ()
    assert torch.equal(executor._state["calls"], artifact.tensors["calls"])
