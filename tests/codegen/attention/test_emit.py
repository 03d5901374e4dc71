"""Sources of attention, and which kernels a plan can use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fpcompiler
from fpcompiler.codegen.attention import attend_kernels, attend_problems, parse
from fpcompiler.errors import ArtifactError, TargetError
from fpcompiler.huggingface import CachedDecoder
from fpcompiler.runtime.cuda.attention import AttendProblem
from fpcompiler.runtime.executor import Executor
from tests.hf_models import hf_model, token_ids

PROBLEMS = [AttendProblem("bf16", 64), AttendProblem("bf16", 128, "f8E4M3FN")]


def test_a_description_stands_for_its_source() -> None:
    source = attend_kernels(PROBLEMS, "sm_90a")
    assert parse(source.description).text == source.text
    assert source.text.count("struct Problem") == 2
    assert '#include "' not in source.text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"arch": "sm_100a"}, TargetError),
        ({"problems": [{"type": "f32", "width": 64, "cache": ""}]}, ArtifactError),
        ({"problems": [{"type": "bf16", "width": 96, "cache": ""}]}, ArtifactError),
        ({"problems": [{"type": "bf16", "width": 64, "cache": "f8E5M2"}]}, ArtifactError),
        ({"problems": [{"type": "f16", "width": 64, "cache": "f8E4M3FN"}]}, ArtifactError),
        ({"problems": [{"type": "bf16"}]}, ArtifactError),
        ({"problems": 7}, ArtifactError),
    ],
)
def test_other_descriptions_are_refused(change: dict[str, object], error: type) -> None:
    with pytest.raises(error):
        parse({**attend_kernels(PROBLEMS, "sm_90a").description, **change})


def problems_of(
    model: nn.Module, *inputs: torch.Tensor, attention: str = ""
) -> tuple[AttendProblem, ...]:
    artifact = fpcompiler.compile(
        model, "w4a6-row", example_inputs=inputs, attention=attention or None
    ).artifact
    return attend_problems(Executor(artifact.plan, artifact.tensors), inputs)


def test_a_decoder_with_a_cache_gets_kernels_and_other_models_do_not() -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 64, "attn_implementation": "sdpa"}  # fmt: skip
    model = hf_model("hf-llama", **sizes).bfloat16()
    tokens = token_ids(1, 8)
    assert problems_of(CachedDecoder(model, 1, 32), tokens, torch.arange(8)) == (PROBLEMS[0],)
    cached = CachedDecoder(model, 1, 32), tokens, torch.arange(8)
    for operand, wanted in (("f8E4M3FN@token:f32", "f8E4M3FN"), ("f6E2M3FN@token:f32", "")):
        found = problems_of(*cached, attention=f"cache={operand}")
        assert found == (AttendProblem("bf16", 64, wanted),)
    wide = CachedDecoder(hf_model("hf-llama", **sizes), 1, 32)
    assert problems_of(wide, tokens, torch.arange(8)) == ()  # in fp32
