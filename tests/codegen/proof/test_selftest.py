"""Golden problems on kernels that compute on the CPU: right ones pass, a wrong one does not."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from fpcompiler.artifact.kernels import TargetKernels
from fpcompiler.codegen.cutlass.quantized import QuantizedOutput
from fpcompiler.codegen.proof.packed_problem import packed_problems
from fpcompiler.codegen.proof.selftest import problems_for, selftest, time_gemms
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode
from fpcompiler.runtime.cuda.form import CudaInput
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.layers import CudaLinear, Gemm, Machine
from fpcompiler.runtime.cuda.quantizers import QuantizeKernels
from tests.runtime.cuda.host_kernels import Kernels, describe_gemm, host_gemm
from tests.runtime.cuda.test_fragments import values_of

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
def test_kernels_that_add_a_residual_add_nothing(tmp_path) -> None:
    kernels = Kernels(tmp_path, *PAIRS["mxf8f6f4"], "sm_100a", "bf16", residual=True).open("layer")
    results = list(selftest(kernels))
    assert {result.kernel for result in results} == {"decode", "prefill"}
    assert all(result.verdict.passed for result in results)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("producer", ["", "gelu_tanh"])
def test_kernels_that_quantize_their_output_are_compared_with_two_steps(
    producer: str, tmp_path
) -> None:
    quantized = QuantizedOutput("f6E2M3FN@block32:f8E8M0FNU:mse", producer)
    made = Kernels(tmp_path, *PAIRS["mxf8f6f4"], "sm_120a", "bf16", quantized=quantized)
    kernels = made.open("layer")
    results = list(selftest(kernels))
    assert all(result.verdict.passed for result in results)
    compared = [r for r in results if r.verdict.problem.startswith("output to f6E2M3FN")]
    assert [r.kernel for r in compared] == ["decode-quantized"] * 2 + ["prefill-quantized"] * 2

    # Kernels that quantize something else than the plain one gives fail.
    other = QuantizedOutput("f6E2M3FN@block32:f8E8M0FNU:mse", "relu")
    (tmp_path / "wrong").mkdir()
    wrong = Kernels(
        tmp_path / "wrong", *PAIRS["mxf8f6f4"], "sm_120a", "bf16", quantized=other
    ).open("layer")
    gemms = {
        name: replace(gemm, library=wrong.gemms[name].library) if gemm.quantizing else gemm
        for name, gemm in kernels.gemms.items()
    }
    found = [r.verdict for r in selftest(replace(kernels, gemms=gemms))]
    assert not any(v.passed for v in found if v.problem.startswith("output to"))


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


PACKED = [(Mode.INTEGERS, "none"), (Mode.E4M3, "none"), (Mode.BF16, "none")]
PACKED += [(Mode.BF16, "block16:f8E4M3FN"), (Mode.BF16, "block32:f8E8M0FNU")]


def packed(mode: Mode, scale: str) -> Gemm:
    return Gemm(0, mode.element, "f4E2M1FN", scale, torch.bfloat16, "none", mode)


def kernels_of(gemm: Gemm) -> CudaKernels:
    target = TargetKernels("sm_90a", ("9.0",), {}, {}, {})
    machine = Machine(torch.device("cpu"), 132)
    return CudaKernels(target, {"packed": gemm}, QuantizeKernels({}), machine)


def multiplied(linear: CudaLinear, x: CudaInput) -> torch.Tensor:
    """Return what a kernel returns for the bytes of its operands."""
    mode, weights, k = linear._decode.mode, linear._weights, linear.kind.k
    operand = packed_problems(linear._decode)[0].weight
    w = values_of(weights, operand, mode, k)
    if mode is Mode.E4M3:
        values = decode(x.codes[:, :k], FORMATS["f8E4M3FN"]).double()
    else:
        values = x.codes.view({Mode.INTEGERS: torch.int8, Mode.BF16: torch.bfloat16}[mode])
        values = values[:, :k].double()
    if x.token_scale is not None:
        values = values * x.token_scale[: x.rows, None]
    return (values @ w.T * (linear._alpha / weights.alpha)).to(torch.bfloat16)


@pytest.mark.parametrize(("mode", "scale"), PACKED)
def test_kernels_of_packed_weights_have_problems_of_their_own(mode, scale, monkeypatch) -> None:
    monkeypatch.setattr(CudaLinear, "multiply", multiplied)
    results = list(selftest(kernels_of(packed(mode, scale))))
    assert len(results) == 3
    assert all(result.verdict.passed for result in results)
    assert all(result.verdict.problem.startswith("packed f4E2M1FN") for result in results)
    monkeypatch.setattr(CudaLinear, "multiply", lambda linear, x: multiplied(linear, x).roll(1, 1))
    assert not any(result.verdict.passed for result in selftest(kernels_of(packed(mode, scale))))


@pytest.mark.parametrize(("mode", "scale"), PACKED)
def test_kernels_of_packed_weights_are_timed(mode, scale, monkeypatch) -> None:
    """What CUDA's events say is not looked at, but every operand must be one that kernels read."""

    class Event:
        def __init__(self, timed: bool) -> None:
            assert timed

        def record(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 0.5

    calls = []
    monkeypatch.setattr("fpcompiler.codegen.proof.selftest._TIMED", ((1, 64, 128), (17, 40, 256)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(CudaLinear, "multiply", lambda linear, x: calls.append(x.rows))
    gemm = replace(packed(mode, scale), activation="silu")
    assert [timing.microseconds for timing in time_gemms(kernels_of(gemm))] == [500.0, 500.0]
    assert {*calls} == {1, 17}
