"""Golden problems on kernels that compute on the CPU: right ones pass, a wrong one does not."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from fpcompiler.codegen.proof.selftest import problems_for, selftest
from tests.runtime.cuda.host_kernels import Kernels, describe_gemm, host_gemm

PAIRS = {
    "nvf4": ("e2m1@block16:e4m3", "e2m1@block16:e4m3"),
    "mxf8f6f4": ("e2m1@block32:e8m0", "e2m3@block32:e8m0"),
    "f8f6f4": ("e2m1@row:f32", "e3m2@token:f32"),
}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("output", ["f32", "bf16"])
def test_right_kernels_pass(kind: str, output: str, tmp_path) -> None:
    kernels = Kernels(tmp_path, *PAIRS[kind], "sm_100a", output).open("layer")
    results = list(selftest(kernels))
    assert len(results) >= 4
    assert {result.kernel for result in results} == {"decode", "prefill"}
    assert all(result.verdict.passed for result in results)
    assert {result.verdict.problem.split()[0] for result in results} == {kind}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_kernel_that_reads_another_format_fails(tmp_path) -> None:
    made = Kernels(tmp_path, *PAIRS["mxf8f6f4"], "sm_100a")
    kernels = made.open("layer")
    other = describe_gemm("e2m1@block32:e8m0", "e3m2@block32:e8m0", "sm_100a", "f32")
    library = host_gemm(other, tmp_path / "other.so")
    wrong = torch.ops.fpc_cuda.open(str(library))
    gemms = {
        name: type(gemm)(**{**vars(gemm), "library": wrong}) for name, gemm in kernels.gemms.items()
    }
    swapped = type(kernels)(**{**vars(kernels), "gemms": gemms})
    assert not any(result.verdict.passed for result in selftest(swapped))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_kernels_without_golden_problems_have_none(tmp_path) -> None:
    kernels = Kernels(tmp_path, *PAIRS["nvf4"], "sm_100a").open("layer")
    gemm = kernels.gemms["decode"]
    assert problems_for(gemm)
    assert not problems_for(replace(gemm, activation="silu"))
