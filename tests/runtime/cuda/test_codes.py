"""Quantizers of caches, by kernels that are compiled for the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fpcompiler
from fpcompiler.artifact.kernels import TargetKernels
from fpcompiler.codegen.quantize_problems import quantize_problems
from fpcompiler.errors import NumericsError
from fpcompiler.huggingface import CachedDecoder
from fpcompiler.numerics import quantize
from fpcompiler.operand import Operand
from fpcompiler.plan import Step
from fpcompiler.runtime.cuda.codes import CudaCodes, kind_of
from fpcompiler.runtime.cuda.flags import Flags
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.cuda.quantizers import QuantizeKernels
from fpcompiler.runtime.executor import Executor
from tests.hf_models import hf_model, token_ids
from tests.runtime.cuda.host_kernels import CPU, host_quantizers, operators

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

CACHE = "f8E4M3FN@token:f32"
OPERANDS = [CACHE, "f8E4M3FN@tensor:f32", "f8E5M2@token:f32", "f8E4M3FN"]
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> QuantizeKernels:
    operators()
    wanted = [QuantizeProblem(Operand.parse(text), name) for text in OPERANDS for name in TYPES]
    path = tmp_path_factory.mktemp("codes") / "quantize.so"
    return QuantizeKernels.of([host_quantizers(wanted, path)])


def step(operand: str) -> Step:
    args = ({"v": "x"}, operand, "attention")
    return Step(op="fpc.quantize", args=args, kwargs={}, outs=("codes", "scale"))


def refuse(*_: object) -> list[Tensor]:
    raise AssertionError("the operator was called")


def codes_of(operand: str, kernels: QuantizeKernels) -> CudaCodes:
    kind = kind_of(step(operand))
    assert kind is not None
    return CudaCodes.of(kind, kernels, refuse, Flags(1, torch.device("cpu")), 0)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", TYPES)
def test_codes_and_scales_are_those_of_the_operator(
    operand: str, name: str, kernels: QuantizeKernels
) -> None:
    """Rows as they lie in memory where heads were split, and where a row is cut off."""
    run = codes_of(operand, kernels)
    wide = torch.randn(2, 5, 3, 70, generator=torch.Generator().manual_seed(0)).to(TYPES[name])
    for x in (wide, wide.transpose(1, 2), wide[..., :33], wide[:1, :1].transpose(1, 2)):
        codes, scales = quantize(x, Operand.parse(operand))
        found = run(x, operand, "attention")
        assert len(found) == 1 + len(scales)
        for ours, theirs in zip(found, (codes, *scales), strict=True):
            assert ours.shape == theirs.shape
            assert torch.equal(ours, theirs)


def test_other_operands_are_left_to_the_operator() -> None:
    for operand in ("f6E2M3FN@token:f32", "f4E2M1FN@token:f32", "f8E4M3FN@block32:f8E8M0FNU"):
        assert kind_of(step(operand)) is None


def test_a_decoder_with_a_cache_in_fp8(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 64, "attn_implementation": "sdpa"}  # fmt: skip
    model = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 2, 40, last_logits=1)
    inputs = token_ids(2, 8), torch.arange(8)
    made = fpcompiler.compile(
        model, "w4a16", example_inputs=inputs, attention=f"cache={CACHE}", target="reference"
    )
    artifact = made.artifact
    plain = Executor(artifact.plan, artifact.tensors)
    problems = quantize_problems(plain, inputs, {})
    assert problems == ({}, (QuantizeProblem(Operand.parse(CACHE), "bf16"),))
    quantizers = QuantizeKernels.of([host_quantizers(problems.codes, tmp_path / "quantize.so")])
    target = TargetKernels("sm_90a", ("9.0",), {}, {}, {})
    kernels = CudaKernels(target, {}, quantizers, CPU)
    fast = Executor(artifact.plan, artifact.tensors, kernels=kernels)
    assert (
        sum(isinstance(i.function, CudaCodes) for i in fast._code) == len(artifact.plan.state) // 2
    )
    tokens, position = inputs
    for index in range(5):
        expected, found = (executor.run(tokens, position) for executor in (plain, fast))
        assert torch.equal(expected, found)
        tokens, position = expected[:, -1:].argmax(-1), torch.tensor([8 + index])
    for name, state in plain._state.items():
        assert torch.equal(state, fast._state[name])


def test_nan_names_the_layer(kernels: QuantizeKernels) -> None:
    sizes = {"head_dim": 64, "attn_implementation": "sdpa"}
    model = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 1, 16)
    inputs = token_ids(1, 3), torch.arange(3)
    made = fpcompiler.compile(
        model, "w4a16", example_inputs=inputs, attention=f"cache={CACHE}", target="reference"
    )
    tensors = dict(made.artifact.tensors)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    own = CudaKernels(TargetKernels("sm_90a", ("9.0",), {}, {}, {}), {}, kernels, CPU)
    with pytest.raises(NumericsError, match="self_attn"):
        Executor(made.artifact.plan, tensors, kernels=own).run(*inputs)
