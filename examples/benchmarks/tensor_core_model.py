"""Whether the model of tensor cores equals a Hopper GPU, bit for bit.

Each random problem goes through three: ``numerics.tensor_core``; a kernel of plain ``wgmma`` in
order of K (``tensor_core_model.cu``, built with nvcc); and cuBLAS through PyTorch, whose order of
additions is its own affair: where it splits K or keeps two accumulators it differs, and that is no
error. Run it with ``python examples/benchmarks/tensor_core_model.py`` on an H100 or H200; it prints
a table, writes ``results/tensor_core_model.json``, and fails if the model differs from the kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpcompiler import numerics
from fpcompiler.formats import FORMATS
from fpcompiler.numerics.tensor_core import HOPPER_BF16, HOPPER_FP8, Factor, tensor_core_gemm

HERE: Final = Path(__file__).resolve().parent
SOURCE: Final = HERE / "tensor_core_model.cu"
E4M3: Final = FORMATS["f8E4M3FN"]
FLAGS: Final = (
    "-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-cudart", "static",
    "-Xcompiler", "-fPIC,-fvisibility=hidden",
)  # fmt: skip
SIZES: Final = ((128, 64, 64), (64, 128, 512), (192, 64, 1024), (128, 128, 4096))
SEEDS: Final = (0, 1)

Multiply = Callable[[Tensor, Tensor], Tensor]
"""``a @ b.T`` in fp32, of two matrices of float8_e4m3fn or bfloat16 that lie in rows."""


@dataclass(frozen=True)
class Problem:
    """Two random matrices.

    Attributes:
        family: What is in them.
        size: M, N and K.
        seed: Of the random numbers.
    """

    family: str
    size: tuple[int, int, int]
    seed: int

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return ``[M, K]`` and ``[N, K]``, float8_e4m3fn or bfloat16, on the CPU."""
        m, n, k = self.size
        generator = torch.Generator().manual_seed(self.seed)
        make = FAMILIES[self.family]
        return make((m, k), generator, 0), make((n, k), generator, 1)


def in_e4m3(values: Tensor) -> Tensor:
    return numerics.encode(values, E4M3).view(torch.float8_e4m3fn)


def codes_in_e4m3(*names: str) -> Callable[[tuple[int, int], torch.Generator, int], Tensor]:
    """Random codes of a narrow format for each side, as E4M3: what W4A6 is on Hopper."""

    def make(shape: tuple[int, int], generator: torch.Generator, side: int) -> Tensor:
        spec = FORMATS[names[side]]
        codes = torch.randint(0, spec.code_count, shape, dtype=torch.uint8, generator=generator)
        values = numerics.decode(codes, spec)
        return in_e4m3(values.nan_to_num_(0.0))

    return make


def gaussian_e4m3(scale: float) -> Callable[[tuple[int, int], torch.Generator, int], Tensor]:
    return lambda shape, generator, side: in_e4m3(torch.randn(shape, generator=generator) * scale)


def bf16(spread: int) -> Callable[[tuple[int, int], torch.Generator, int], Tensor]:
    """Gaussian numbers times random powers of two, ``2**-spread`` to ``2**spread``."""

    def make(shape: tuple[int, int], generator: torch.Generator, side: int) -> Tensor:
        exponents = torch.randint(-spread, spread + 1, shape, generator=generator)
        return torch.ldexp(torch.randn(shape, generator=generator), exponents).bfloat16()

    return make


def sparse_bf16(shape: tuple[int, int], generator: torch.Generator, side: int) -> Tensor:
    """Zeros on one side stand at large numbers of the other: do they take part in alignment?"""
    columns = torch.arange(shape[1]) % 2 == 1
    large = 0.0 if side == 0 else 2.0**60
    return torch.where(columns, large, torch.randn(shape, generator=generator)).bfloat16()


FAMILIES: Final[Mapping[str, Callable[[tuple[int, int], torch.Generator, int], Tensor]]] = {
    "E2M3 x E2M1 in E4M3": codes_in_e4m3("f6E2M3FN", "f4E2M1FN"),
    "E3M2 x E2M1 in E4M3": codes_in_e4m3("f6E3M2FN", "f4E2M1FN"),
    "E4M3 x E2M1 in E4M3": codes_in_e4m3("f8E4M3FN", "f4E2M1FN"),
    "E4M3 x E4M3, all codes": codes_in_e4m3("f8E4M3FN", "f8E4M3FN"),
    "E4M3 x E4M3, gaussian": gaussian_e4m3(1.0),
    "E4M3 x E4M3, gaussian * 2**-8 (subnormal)": gaussian_e4m3(2.0**-8),
    "E4M3 x E4M3, gaussian * 64": gaussian_e4m3(64.0),
    "bf16, gaussian": bf16(0),
    "bf16, gaussian * 2**(-8..8)": bf16(8),
    "bf16, gaussian * 2**(-30..30)": bf16(30),
    "bf16, zeros at large numbers": sparse_bf16,
}


def problems() -> Iterator[Problem]:
    for family in FAMILIES:
        for size in SIZES:
            for seed in SEEDS:
                yield Problem(family, size, seed)


def model(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.bfloat16:
        return tensor_core_gemm(Factor.of_bf16(a), Factor.of_bf16(b), HOPPER_BF16)
    left, right = (Factor.of_codes(x.view(torch.uint8), E4M3) for x in (a, b))
    return tensor_core_gemm(left, right, HOPPER_FP8)


def cublas(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(
        a, b.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
    )


def build(folder: Path) -> Path:
    """Compile the kernel, and return the library."""
    library = folder / "tensor_core_model.so"
    subprocess.run(["nvcc", *FLAGS, str(SOURCE), "-o", str(library)], check=True)
    return library


def wgmma(library: Path) -> Multiply:
    """Return the kernel as a function."""
    run = ctypes.CDLL(str(library)).wgmma_gemm
    run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 4 + [ctypes.c_void_p]

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        m, n, row = a.shape[0], b.shape[0], a.shape[1] * a.element_size()
        # NaN everywhere: a number that is not written cannot look right.
        d = torch.full((m, n), torch.nan, device=a.device)
        is_bf16 = int(a.dtype == torch.bfloat16)
        stream = torch.cuda.current_stream().cuda_stream
        pointers = (a.data_ptr(), b.data_ptr(), d.data_ptr())
        error = run(*pointers, m, n, row, is_bf16, stream)
        if error:
            raise RuntimeError(f"the kernel failed with CUDA error {error}")
        return d

    return multiply


def differing(result: Tensor, expected: Tensor) -> int:
    """Return how many numbers have other bits."""
    return int((result.view(torch.int32) != expected.view(torch.int32)).sum())


def first_difference(result: Tensor, expected: Tensor) -> dict[str, Any] | None:
    places = (result.view(torch.int32) != expected.view(torch.int32)).nonzero()
    if not len(places):
        return None
    i, j = places[0].tolist()
    return {"at": [i, j], "gpu": result[i, j].item().hex(), "model": expected[i, j].item().hex()}


def compare(problem: Problem, kernel: Multiply, other: Multiply, device: str) -> dict[str, Any]:
    """Return what a problem showed, as a row of the record."""
    a, b = (x.to(device) for x in problem.operands())
    expected = model(a, b)
    result, theirs = kernel(a, b), other(a, b)
    exact = a.double() @ b.double().T
    error = (expected - exact).norm() / exact.norm()
    return {
        "family": problem.family,
        "size": list(problem.size),
        "seed": problem.seed,
        "elements": expected.numel(),
        "differing": differing(result, expected),
        "differing_cublas": differing(theirs, expected),
        "relative_error": float(error),
        "first_difference": first_difference(result, expected),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'problems':45} {'number':>6} {'equal':>6} {'cuBLAS equal':>13} {'largest error':>14}")
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        equal = sum(row["differing"] == 0 for row in own)
        theirs = sum(row["differing_cublas"] == 0 for row in own)
        largest = max(row["relative_error"] for row in own)
        print(f"{family:45} {len(own):6} {equal:6} {theirs:13} {largest:14.1e}")


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "date": datetime.date.today().isoformat(),
        "model": "fpcompiler.numerics.tensor_core",
        "problems": len(rows),
        "bit_equal": sum(row["differing"] == 0 for row in rows),
        "results": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, help="the kernel, built elsewhere with nvcc")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "tensor_core_model.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("this needs an H100 or H200")
    with tempfile.TemporaryDirectory() as folder:
        kernel = wgmma(arguments.library or build(Path(folder)))
        rows = [compare(problem, kernel, cublas, "cuda") for problem in problems()]
    show(rows)
    arguments.output.write_text(json.dumps(record(rows), indent=1) + "\n", encoding="utf-8")
    wrong = sum(row["differing"] > 0 for row in rows)
    sys.exit(f"{wrong} of {len(rows)} problems differ from the model" if wrong else 0)


if __name__ == "__main__":
    main()
