"""Attention as a step of a plan, by a library that computes on the CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fpcompiler
from fpcompiler.artifact import Artifact
from fpcompiler.artifact.kernels import TargetKernels
from fpcompiler.errors import ArtifactError
from fpcompiler.huggingface import CachedDecoder
from fpcompiler.runtime.cuda.attention import (
    MOST_ROWS,
    AttendKernels,
    AttendProblem,
    Call,
    CudaAttention,
    is_small,
    problem_of,
)
from fpcompiler.runtime.cuda.cached import caches_of
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.quantizers import QuantizeKernels
from fpcompiler.runtime.executor import Executor
from tests.codegen.attention.emulated import build
from tests.hf_models import hf_model, token_ids
from tests.runtime.cuda.host_kernels import CPU, host_quantizers, operators

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

SDPA = torch.ops.aten.scaled_dot_product_attention.default
PROBLEM = AttendProblem("bf16", 64)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> AttendKernels:
    operators()
    problems = [PROBLEM, replace(PROBLEM, cache="f8E4M3FN")]
    return AttendKernels.of([build(problems, tmp_path_factory.mktemp("attend"))])


def refuse(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("the operator of torch was called")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found.float() - expected.float()).norm() / expected.float().norm()) < 0.01


@pytest.mark.parametrize("offset", [0, 3, 8])
@pytest.mark.parametrize("extra", [0, 4])
def test_views_of_larger_tensors(kernels: AttendKernels, offset: int, extra: int) -> None:
    """Rows that do not begin at multiples of 16 bytes are copied by the operator."""
    wide = random(2, 5, 6, 80 + extra)[..., offset : offset + 64]
    q, k, v = (
        wide[:, :1, :4].transpose(1, 2),
        *(wide[:, :, i : i + 2].transpose(1, 2) for i in (0, 4)),
    )
    attention = CudaAttention(kernels, 4, refuse)
    mask = torch.rand(1, 5) < 0.7
    mask[:, 0] = True
    found = attention(q, k, v, mask, enable_gqa=True)
    assert found.shape == q.shape
    assert near(found, SDPA(q, k, v, mask, enable_gqa=True))
    assert near(attention(q, k, v, None, 0.0, False, scale=0.3, enable_gqa=True),
                SDPA(q, k, v, None, 0.0, False, scale=0.3, enable_gqa=True))  # fmt: skip


def test_what_no_kernel_takes() -> None:
    q, k, v = random(1, 4, 1, 64), random(1, 2, 8, 64), random(1, 2, 8, 64)
    assert problem_of(Call(q, k, v, grouped=True)) == PROBLEM
    others = [
        Call(q, k, v, grouped=True, dropout=0.1),
        Call(q.float(), k.float(), v.float(), grouped=True),
        Call(q, k.half(), v, grouped=True),
        Call(q, k, v, torch.zeros(1, 8), grouped=True),  # a mask of numbers
        Call(q[..., :32], k[..., :32], v[..., :32], grouped=True),
        Call(q[..., ::2], k[..., ::2], v[..., ::2], grouped=True),
        Call(q, k, v[:, :, :4], grouped=True),
        Call(q[0], k[0], v[0], grouped=True),
    ]
    assert [problem_of(call) for call in others] == [None] * len(others)
    assert is_small(Call(q, k, v, grouped=True))
    assert is_small(Call(q.expand(1, 4, MOST_ROWS // 2, 64), k, v, grouped=True))
    for call in (
        Call(q, k, v),  # heads differ
        Call(q.expand(1, 4, MOST_ROWS // 2 + 1, 64), k, v, grouped=True),
        Call(q, k[:, :, :0], v[:, :, :0], grouped=True),
        Call(q[:, :3], k, v, grouped=True),
    ):
        assert not is_small(call)


def test_other_calls_are_those_of_torch(kernels: AttendKernels) -> None:
    attention = CudaAttention(kernels, 4, SDPA)
    for size in (32, 64):
        q, k, v = (random(1, 2, 20, size) for _ in range(3))
        assert torch.equal(attention(q, k, v, is_causal=True), SDPA(q, k, v, is_causal=True))


def test_torch_compile_traces_it(kernels: AttendKernels) -> None:
    attention = CudaAttention(kernels, 4, refuse)
    q, k, v = random(1, 4, 1, 64), random(1, 2, 40, 64), random(1, 2, 40, 64)
    mask = torch.arange(40) <= 20

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[..., :64] * 1, k, v, mask, enable_gqa=True) + 1

    compiled = torch.compile(run, fullgraph=True)
    assert near(compiled(q, k, v), run(q, k, v))


def test_libraries_of_others_are_refused(tmp_path: Path) -> None:
    operators()
    with pytest.raises(ArtifactError, match="holds no kernels named attend"):
        AttendKernels.of([host_quantizers([], tmp_path / "quantize.so")])


@pytest.mark.parametrize("cache", ["", "cache=f8E4M3FN@token:f32", "cache=f6E2M3FN@token:f32"])
def test_a_decoder_computes_the_same_text(kernels: AttendKernels, cache: str) -> None:
    """Caches of eight bits are read as they are; others are unpacked as before."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 64, "attn_implementation": "sdpa"}  # fmt: skip
    model = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 2, 40, last_logits=1)
    inputs = token_ids(2, 8), torch.arange(8)
    artifact = fpcompiler.compile(
        model, "w4a16", example_inputs=inputs, attention=cache or None
    ).artifact
    target = TargetKernels("sm_90a", ("9.0",), {}, {}, {})
    own = CudaKernels(target, {}, QuantizeKernels({}), CPU, kernels)
    plain = Executor(artifact.plan, artifact.tensors)
    plain._programs = None
    fast = Executor(artifact.plan, artifact.tensors, kernels=own)
    uses = [i.function for i in fast._code if isinstance(i.function, CudaAttention)]
    assert len(uses) == sum("scaled_dot_product" in i.step.op for i in fast._code) > 0
    assert len(caches_of(artifact.plan)) == (len(uses) if "f8E4M3FN" in cache else 0)
    tokens, position = inputs
    for step in range(6):
        expected, found = (executor.run(tokens, position) for executor in (plain, fast))
        assert near(found, expected)
        tokens, position = expected[:, -1:].argmax(-1), torch.tensor([8 + step])


def test_values_of_a_cache_that_something_else_reads_stay() -> None:
    artifact = _cached_artifact()
    plan = artifact.plan
    assert len(caches_of(plan)) > 0
    names = [s.outs[0] for s in plan.steps if s.op in ("fpc.dequantize", "fpc.unpack")]
    for name in names[:2]:
        shown = replace(plan, outputs=(name,))
        assert len(caches_of(shown)) == len(caches_of(plan)) - 1


def _cached_artifact() -> Artifact:
    sizes = {"head_dim": 64, "attn_implementation": "sdpa"}
    model = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 1, 16)
    inputs = token_ids(1, 3), torch.arange(3)
    made = fpcompiler.compile(
        model, "w4a16", example_inputs=inputs, attention="cache=f8E4M3FN@token:f32"
    )
    return made.artifact
