"""Libraries of artifacts, generated again from their descriptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fpcompiler.codegen.rebuild import describe_quantizers, quantize_kernels, rebuild
from fpcompiler.codegen.torch_operators import build_operators
from fpcompiler.errors import ArtifactError, TargetError
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from tests.runtime.cuda.host_kernels import describe_gemm

TOKEN = Operand.parse("f6E2M3FN@token:f32")
PROBLEMS = (
    QuantizeProblem(TOKEN, "bf16", stored="f8E4M3FN"),
    QuantizeProblem(TOKEN, "bf16", "silu_mul", ("", "", "bf16", ""), hadamard=32),
)


def test_the_description_of_quantizers_is_json_and_says_all() -> None:
    source = quantize_kernels(PROBLEMS, "sm_90a")
    assert source.description == json.loads(json.dumps(describe_quantizers(PROBLEMS, "sm_90a")))
    assert all(str(problem) in source.text for problem in PROBLEMS)
    assert source.arch == "sm_90a"


@pytest.mark.parametrize(
    "change",
    [
        {"operand": "f6E2M3FN@token:f32\n#include </etc/passwd>"},
        {"input": 'bf16"'},
        {"producer": "silu_add"},
        {"stored": 1},
        {"stored": "i8*/"},
        {"swizzled": 1},
        {"hadamard": "32"},
        {"beside": ["", ""]},
        {"beside": ["", "", "", "*/"]},
        {"more": 1},
    ],
)
def test_descriptions_that_are_none_are_refused(change: dict[str, object]) -> None:
    description = describe_quantizers(PROBLEMS, "sm_90a")
    description["problems"][0] |= change
    with pytest.raises(ArtifactError, match="describes no kernels of this version"):
        rebuild("quantize", description, Options())


def test_unknown_roles_and_architectures_are_refused() -> None:
    with pytest.raises(ArtifactError, match="no kernels with the role 'shell'"):
        rebuild("shell", {}, Options())
    with pytest.raises(TargetError, match="cannot be compiled for 'sm_1'"):
        rebuild("quantize", describe_quantizers(PROBLEMS, "sm_1"), Options())


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_operators_are_rebuilt() -> None:
    assert rebuild("operators", {}, Options.from_env()) == build_operators()


@pytest.mark.nvcc
def test_quantizers_are_rebuilt_to_the_same_bytes(tmp_path: Path) -> None:
    description = json.loads(json.dumps(describe_quantizers(PROBLEMS[:1], "sm_90a")))
    first, second = (
        rebuild("quantize", description, Options(cache=tmp_path / name)).read_bytes()
        for name in ("first", "second")
    )
    assert first == second


def test_gemms_with_a_tile_of_their_own_are_refused() -> None:
    description = describe_gemm("f4E2M1FN@row:f32", "f6E2M3FN@token:f32", "sm_90a", "bf16")
    with pytest.raises(ArtifactError, match="describes no kernel of this version"):
        rebuild("gemm", {**description, "tile": {"m": 1}}, Options())
