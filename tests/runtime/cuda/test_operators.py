"""The operator library: what it loads, launches and refuses, with kernels that run on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fpcompiler.codegen import torch_operators
from fpcompiler.codegen.torch_operators import build_operators, operators_source
from fpcompiler.errors import ArtifactError, DependencyError, OptionError
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda import operators
from fpcompiler.runtime.cuda.operators import VERSION, load_operators, open_library
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from tests.runtime.cuda import host_kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

PAIR = ("f4E2M1FN@row:f32/block32:f8E8M0FNU", "f6E2M3FN@block32:f8E8M0FNU", "sm_100a", "f32")
M, N, K = 3, 8, 128


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> int:
    host_kernels.operators()
    path = tmp_path_factory.mktemp("kernels") / "gemm.so"
    return open_library(host_kernels.host_gemm(host_kernels.describe_gemm(*PAIR), path))


def arguments(library: int, **changes: Any) -> tuple[Any, ...]:
    named = {
        "library": library,
        "a": torch.zeros(M, K * 6 // 8, dtype=torch.uint8),
        "a_scales": torch.full((512,), 127, dtype=torch.uint8),
        "b": torch.zeros(N, K // 2, dtype=torch.uint8),
        "b_scales": torch.full((512,), 127, dtype=torch.uint8),
        "token_scale": torch.ones(M),
        "row_scale": torch.ones(N),
        "bias": torch.arange(float(N)),
        "residual": None,
        "scalar": None,
        "alpha": 1.0,
        "m": M,
        "n": N,
        "k": K,
        "sms": 4,
        "out": torch.float32,
    }
    return tuple({**named, **changes}.values())


def test_zero_times_zero_is_the_bias(gemm: int) -> None:
    y = torch.ops.fpc_cuda.gemm(*arguments(gemm))
    assert torch.equal(y, torch.arange(float(N)).expand(M, N))


def test_torch_accepts_the_operators(gemm: int, tmp_path: Path) -> None:
    opcheck(torch.ops.fpc_cuda.gemm.default, arguments(gemm))
    problem = QuantizeProblem(Operand.parse("f6E2M3FN@token:f32"), "f32", stored="f8E4M3FN")
    path = host_kernels.host_quantizers([problem], tmp_path / "quantize.so")
    x, status = torch.randn(4, 10), torch.zeros(1, dtype=torch.int32)
    opcheck(torch.ops.fpc_cuda.quantize.default, quantize_arguments(open_library(path), x, status))


def quantize_arguments(library: int, x: Tensor, status: Tensor, index: int = 0) -> tuple[Any, ...]:
    rows = len(x)
    nothing = (None, None, None, 1, 0, None, 1, 0)
    return (library, index, x, rows, 10, 10, *nothing, 0.0, 128, rows, 0, 0, status)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(M, 128, dtype=torch.int8)}, "A has another type"),
        ({"a": torch.zeros(M, 97, dtype=torch.uint8)}, "A does not hold 3 rows of 128 codes of 6"),
        ({"a": torch.zeros(M, 128, dtype=torch.uint8)}, "A does not hold 3 rows of 128 codes of 6"),
        ({"a": torch.zeros(M, 256, dtype=torch.uint8)}, "A does not hold 3 rows of 128 codes of 6"),
        ({"a": torch.zeros(M - 1, 96, dtype=torch.uint8)}, "A does not hold 3 rows of 128"),
        ({"a": torch.zeros(M * 96, dtype=torch.uint8)}, "A does not hold 3 rows of 128"),
        ({"b": torch.zeros(N, 96, dtype=torch.uint8)}, "B does not hold 8 rows of 128 codes of 4"),
        ({"b": torch.zeros(N - 1, 64, dtype=torch.uint8)}, "B does not hold 8 rows"),
        ({"b_scales": torch.zeros(511, dtype=torch.uint8)}, "B's scales has 511.*reads 512"),
        ({"a_scales": None}, "an operand that it needs is missing"),
        ({"token_scale": torch.ones(M - 1)}, "scales of tokens has 2 numbers"),
        ({"row_scale": torch.ones(2 * N)[::2]}, "scales of rows has another type.*or gaps"),
        ({"bias": torch.ones(N).double()}, "the bias has another type"),
        ({"scalar": torch.ones(0)}, "scale of A has 0 numbers"),
        ({"residual": torch.ones(2)}, "the residual has 2 numbers; the kernel reads 24"),
        ({"n": 6, "b": torch.zeros(6, 64, dtype=torch.uint8)}, "does not compute these sizes"),
        ({"out": torch.bfloat16}, "gives results of another type"),
        ({"m": -1}, "no GEMM of M = -1"),
        ({"k": 1 << 31}, "no GEMM of M"),
        ({"library": 9999}, "there is no library 9999"),
    ],
)
def test_what_does_not_fit_is_refused(gemm: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fpc_cuda.gemm(*arguments(**{"library": gemm, **changes}))


def test_quantizers_refuse_what_does_not_fit(gemm: int, tmp_path: Path) -> None:
    problem = QuantizeProblem(Operand.parse("f6E2M3FN@token:f32"), "f32", stored="f8E4M3FN")
    library = open_library(host_kernels.host_quantizers([problem], tmp_path / "quantize.so"))
    x, status = torch.randn(4, 10), torch.zeros(1, dtype=torch.int32)
    quantize = torch.ops.fpc_cuda.quantize
    codes, scale, blocks = quantize(*quantize_arguments(library, x, status))
    assert codes.shape == (4, 128)
    assert not codes[:, 10:].any()
    assert (scale.shape, blocks.shape, int(status)) == ((4,), (0,), 0)
    x[2, 2] = torch.inf
    quantize(*quantize_arguments(library, x, status))
    assert int(status) == 1
    with pytest.raises(RuntimeError, match=r"kernel 1 of .* does not quantize 4 rows of 10"):
        quantize(*quantize_arguments(library, x, status, index=1))
    with pytest.raises(RuntimeError, match="status has another type"):
        quantize(*quantize_arguments(library, x, status.float()))
    with pytest.raises(RuntimeError, match="holds no kernels that quantize"):
        quantize(*quantize_arguments(gemm, x, status))
    with pytest.raises(RuntimeError, match="holds no GEMM"):
        torch.ops.fpc_cuda.gemm(*arguments(library))


def test_a_library_is_opened_once(gemm: int, tmp_path: Path) -> None:
    path = host_kernels.host_gemm(host_kernels.describe_gemm(*PAIR), tmp_path / "again.so")
    number = open_library(path)
    assert number != gemm
    assert open_library(path) == number


def test_files_that_are_no_kernels_are_refused(tmp_path: Path) -> None:
    host_kernels.operators()
    with pytest.raises(ArtifactError, match="do not load"):
        open_library(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(ArtifactError, match="do not load"):
        open_library(tmp_path / "text.so")
    with pytest.raises(ArtifactError, match="holds no kernels of fpcompiler"):
        open_library(host_kernels.operators())


def changed_gemm(path: Path, old: str, new: str) -> Path:
    """Compile a GEMM whose source is another one in a place."""
    host_kernels.operators()
    host_kernels.host_gemm(host_kernels.describe_gemm(*PAIR), path)
    source = path.with_suffix(".cpp").read_text()
    assert old in source
    path.write_bytes(host_kernels.compiled(source.replace(old, new)))
    return path


def test_an_unknown_type_of_results_is_refused(tmp_path: Path) -> None:
    path = changed_gemm(tmp_path / "gemm.so", '"output": "f32"', '"output": "f64"')
    with pytest.raises(ArtifactError, match="results of a type that this version does not know"):
        open_library(path)


@pytest.mark.parametrize("name", ["f5E2M2FN", "e2m3", ""])
def test_unknown_forms_of_operands_are_refused(name: str, tmp_path: Path) -> None:
    path = changed_gemm(tmp_path / "gemm.so", '"a": "f6E2M3FN"', f'"a": "{name}"')
    with pytest.raises(ArtifactError, match="operands of a form that this version does not know"):
        open_library(path)


@pytest.mark.parametrize(("form", "size"), [("i8", 1), ("bf16", 2)])
def test_operands_have_the_width_that_kernels_read(form: str, size: int, tmp_path: Path) -> None:
    path = changed_gemm(tmp_path / "gemm.so", '"a": "f6E2M3FN"', f'"a": "{form}"')
    library = open_library(path)
    codes, scale = torch.zeros(M, size * K, dtype=torch.uint8), torch.ones(2 * M)
    torch.ops.fpc_cuda.gemm(*arguments(library, a=codes, token_scale=scale))
    wrong = torch.zeros(M, (3 - size) * K, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"A does not hold 3 rows of 128 codes of {8 * size} "):
        torch.ops.fpc_cuda.gemm(*arguments(library, a=wrong, token_scale=scale))


def test_kernels_of_integers_read_sums_behind_the_scales(tmp_path: Path) -> None:
    path = changed_gemm(tmp_path / "gemm.so", '"a": "f6E2M3FN"', '"a": "i8"')
    codes, scale = torch.zeros(M, K, dtype=torch.uint8), torch.ones(2 * M - 1)
    with pytest.raises(RuntimeError, match="scales of tokens has 5 numbers; the kernel reads 6"):
        torch.ops.fpc_cuda.gemm(*arguments(open_library(path), a=codes, token_scale=scale))


def test_what_cuda_said_of_a_launch_is_in_the_error(tmp_path: Path) -> None:
    run = "FPC_EXPORT int32_t fpc_gemm_run(const FpcGemmArguments* args) {"
    text = 'FPC_EXPORT const char* fpc_cuda_error_text(int32_t) { return "no kernel image"; }'
    failing = f"{run} return FPC_LAUNCH + 256 * 209;"
    path = changed_gemm(tmp_path / "told.so", run, f"{text}\n{failing}")
    with pytest.raises(
        RuntimeError,
        match=r"CUDA refused the launch; .* \(status 53510\) \(CUDA error 209: no kernel image\)",
    ):
        torch.ops.fpc_cuda.gemm(*arguments(open_library(path)))
    silent = changed_gemm(tmp_path / "silent.so", run, failing)  # as kernels of before are
    with pytest.raises(RuntimeError, match=r"\(status 53510\)$"):
        torch.ops.fpc_cuda.gemm(*arguments(open_library(silent)))


def test_what_cuda_said_of_a_quantizer_is_in_the_error(tmp_path: Path) -> None:
    host_kernels.operators()
    problem = QuantizeProblem(Operand.parse("f6E2M3FN@token:f32"), "f32", stored="f8E4M3FN")
    path = host_kernels.host_quantizers([problem], tmp_path / "quantize.so")
    source = path.with_suffix(".cpp").read_text()
    start = "    switch (problem) {\n        case 0: return fpc::quantize"
    assert start in source
    path.write_bytes(host_kernels.compiled(source.replace(start, f"    return 98;\n{start}")))
    x, status = torch.randn(4, 10), torch.zeros(1, dtype=torch.int32)
    message = r"CUDA error 98 at the launch.*\(CUDA error 98: an error of CUDA\)"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fpc_cuda.quantize(*quantize_arguments(open_library(path), x, status))


def test_another_version_of_the_interface_is_refused(tmp_path: Path) -> None:
    host_kernels.operators()
    path = host_kernels.host_gemm(host_kernels.describe_gemm(*PAIR), tmp_path / "new.so", abi=2)
    with pytest.raises(ArtifactError, match="has version 2 of the interface of kernels, not 1"):
        open_library(path)


def test_kernels_for_a_gpu_do_not_run_on_the_cpu(tmp_path: Path) -> None:
    """A library without the mark of tests is one for a GPU."""
    host_kernels.operators()
    path = host_kernels.host_gemm(host_kernels.describe_gemm(*PAIR), tmp_path / "gemm.so")
    source = path.with_suffix(".cpp").read_text().replace("fpc_on_host", "fpc_elsewhere")
    other = tmp_path / "gpu.so"
    other.write_bytes(host_kernels.compiled(source))
    with pytest.raises(RuntimeError, match="run on a GPU, and their input is elsewhere"):
        torch.ops.fpc_cuda.gemm(*arguments(open_library(other)))


def test_meta_tensors_have_the_shapes_of_results(gemm: int) -> None:
    values = [v.to("meta") if isinstance(v, Tensor) else v for v in arguments(gemm)]
    y = torch.ops.fpc_cuda.gemm(*values)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (M, N), torch.float32)


def test_the_operators_are_built_once_and_again_when_damaged(tmp_path: Path) -> None:
    options = Options(cache=tmp_path / "cache")
    path = build_operators(options)
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert build_operators(options).stat().st_mtime_ns == stamp
    path.write_bytes(first[:-1] + b"x")
    assert build_operators(options).read_bytes() == first  # builds give the same bytes
    assert (tmp_path / "cache" / "kernels").stat().st_mode & 0o077 == 0


def test_the_operators_are_one_source_with_the_interfaces_in_it() -> None:
    text = operators_source()
    assert "#define FPC_GEMM_ABI 1" in text
    assert "struct FpcGemmArguments" in text
    assert "FpcQuantizeArguments" in text
    assert '#include "' not in text
    assert f"kVersion = {VERSION};" in text


def test_errors_of_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="Point FPC_CACHE"):
        build_operators(Options(cache=tmp_path / "file"))
    monkeypatch.setattr(torch_operators, "_FLAGS", ("-std=c++98",))
    with pytest.raises(DependencyError, match=r"g\+\+ does not compile the operators"):
        build_operators(Options(cache=tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DependencyError, match=r"There is no g\+\+"):
        build_operators(Options(cache=tmp_path / "cache"))


def test_operators_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = host_kernels.operators()
    monkeypatch.setattr(operators, "VERSION", VERSION + 1)
    with pytest.raises(ArtifactError, match=f"version {VERSION}; this fpcompiler needs"):
        load_operators(path)
