"""How kernels of packed weights are launched: the sources, compiled for a CPU without CUDA.

``host/cuda.h`` takes the place of CUDA and notes what is called; no kernel runs.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fpcompiler.codegen.hopper import PackedGemm, emit
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType
from fpcompiler.runtime.cuda.fragments import Mode

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

HOST = Path(__file__).parent / "host"
OK, MISALIGNED, UNSUPPORTED, LAUNCH = 0, 2, 4, 6
SOMEWHERE = 1 << 20
SMS = (16, 78, 114, 132)
ROWS = (1, 2, 7, 8, 9, 13, 16)
INNER = (128, 256, 384, 1024, 3584, 8192, 14336, 65536)
OUTER = (16, 48, 1000, 4096, 18944, 300000)


class Arguments(ctypes.Structure):
    """``FpcGemmArguments`` of kernel_abi.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "a", "a_scales", "b", "b_scales", "d", "residual", "token_scale", "row_scale", "bias",
            "scalar_a", "scalar_b",
        )),
        ("alpha", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("m", "n", "k", "sm_count")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[Mode.INTEGERS, Mode.BF16], ids=lambda mode: mode.value)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    scale = BlockScale.MX32 if request.param is Mode.BF16 else BlockScale.NONE
    instance = PackedGemm(
        "sm_90a", request.param, "f4E2M1FN", scale, OutputType.BF16, Activation.NONE
    )
    path = tmp_path_factory.mktemp("launch") / "kernel.cpp"
    text = without_assembly(emit(instance).text) + (HOST / "launches.h").read_text("utf-8")
    path.write_text(text, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{HOST}", "-include", "cuda.h"]
    built = path.with_suffix(".so")
    subprocess.run(["g++", *flags, str(path), "-o", str(built)], check=True)
    found = ctypes.CDLL(str(built))
    found.test_calls.restype = ctypes.c_char_p
    found.test_residual.restype = ctypes.c_int64
    return found


def without_assembly(text: str) -> str:
    """Return a source without its statements in assembly."""
    kept = []
    while match := re.search(r"\basm(?: volatile)?\(", text):
        kept.append(text[: match.start()])
        text = text[match.end() :]
        depth = 1
        for token in re.finditer(r'"(?:\\.|[^"\\])*"|[()]', text):
            depth += {"(": 1, ")": -1}.get(token[0], 0)
            if depth == 0:
                text = text[token.end() :]
                break
    return "".join(kept) + text


def call(
    library: ctypes.CDLL, m: int, n: int, k: int, sms: int, residual: int | None = None
) -> tuple[int, str]:
    """Return the status of a GEMM and what it called; nothing at the addresses is read."""
    library.test_reset()
    places = dict.fromkeys(("a", "b", "b_scales", "d", "token_scale"), SOMEWHERE)
    places["residual"] = residual
    arguments = Arguments(**places, alpha=1.0, m=m, n=n, k=k, sm_count=sms)
    status = library.fpc_gemm_run(ctypes.byref(arguments))
    return status, library.test_calls().decode()


def test_quotients_in_blocks_are_exact_for_all_sizes(library: ctypes.CDLL) -> None:
    few = 0
    for sms in SMS:
        for k in INNER:
            for n in OUTER:
                for m in ROWS:
                    status, calls = call(library, m, n, k, sms)
                    assert status == OK, (m, n, k, sms)
                    assert library.test_wrong_quotients() == 0, (m, n, k, sms)
                    few += calls == "AL"
    assert few > 1000


def test_shared_memory_of_a_kernel_is_the_same_for_all_sizes(library: ctypes.CDLL) -> None:
    """A launch beyond what the last thread allowed the kernel fails."""
    allowed = set()
    for k in (128, 4096):
        assert call(library, 1, 4096, k, 132) == (OK, "AL")
        allowed.add(library.test_shared_allowed())
        assert library.test_shared_launched() <= library.test_shared_allowed()
    assert len(allowed) == 1


def test_a_thread_has_a_context_before_maps_are_encoded(library: ctypes.CDLL) -> None:
    for m in (17, 64, 300, 5000):
        status, calls = call(library, m, 4096, 4096, 132)
        assert status == OK
        assert re.fullmatch("AM+L", calls)


@pytest.mark.parametrize("m", [1, 16, 17, 4096])
def test_a_gpu_that_tells_no_multiprocessors_is_no_division_by_zero(
    library: ctypes.CDLL, m: int
) -> None:
    assert call(library, m, 4096, 4096, 0) == (LAUNCH, "")
    assert call(library, m, 4096, 4096, 1)[0] == OK


@pytest.mark.parametrize("m", [1, 16, 64, 4096])
def test_an_error_of_cuda_is_in_the_status_and_off_the_thread(library: ctypes.CDLL, m: int) -> None:
    library.test_fail(209)
    try:
        status, _ = call(library, m, 4096, 4096, 132)
    finally:
        library.test_fail(0)
    assert status == LAUNCH + 256 * 209
    assert library.test_last_error() == 0
    assert call(library, m, 4096, 4096, 132)[0] == OK


@pytest.mark.parametrize("m", [1, 16, 17, 4096])
def test_a_residual_is_passed_on(library: ctypes.CDLL, m: int) -> None:
    for residual in (None, SOMEWHERE):
        assert call(library, m, 4096, 4096, 132, residual)[0] == OK
        assert library.test_residual() == (residual or 0)
    assert call(library, m, 4096, 4096, 132, SOMEWHERE + 2) == (MISALIGNED, "")


def test_sizes_that_kernels_do_not_take_are_refused(library: ctypes.CDLL) -> None:
    assert call(library, 0, 4096, 4096, 132) == (OK, "")
    for m, n, k in ((1, 4096, 65664), (1, 4096, 64), (1, 4, 128), (1, 12, 128), (64, 4096, 200)):
        assert call(library, m, n, k, 132) == (UNSUPPORTED, "")
    assert call(library, 1 << 20, 300000, 128, 132)[0] == OK
