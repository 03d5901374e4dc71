"""Level 7: kernels on the GPU that they are for, against the golden problems.

Whoever has such a GPU runs this; for Blackwell nobody here has.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.codegen.proof.golden import GOLDEN, GoldenProblem, GoldenVerdict
from fpcompiler.codegen.proof.output_problem import output_problems
from fpcompiler.codegen.proof.packed_problem import packed_problems
from fpcompiler.formats import FORMATS
from fpcompiler.numerics.kernel_layout import scale_bytes
from fpcompiler.numerics.packing import packed_bytes
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.layers import Gemm, Machine

__all__ = ["GemmResult", "Timing", "selftest", "time_gemms"]

_TIMED: Final = ((1, 4096, 4096), (16, 4096, 4096), (4096, 4096, 4096))
"""M, N and K of the GEMMs that are timed."""
_REPEATS: Final = 20


@dataclass(frozen=True)
class GemmResult:
    """A golden problem on a kernel.

    Attributes:
        kernel: Its name.
        verdict: How the result compares with what is expected.
    """

    kernel: str
    verdict: GoldenVerdict


@dataclass(frozen=True)
class Timing:
    """How long a kernel takes: the median of some calls.

    Attributes:
        kernel: Its name.
        size: M, N and K.
        microseconds: Of a call.
    """

    kernel: str
    size: tuple[int, int, int]
    microseconds: float

    @property
    def tflops(self) -> float:
        """Operations per second, in 10^12; a product and a sum are two."""
        m, n, k = self.size
        return 2 * m * n * k / self.microseconds / 1e6


def selftest(kernels: CudaKernels) -> Iterator[GemmResult]:
    """Run the golden problems on the kernels that multiply their formats.

    Kernels of packed weights read them in an order of their own, and get problems of their own.
    Those that quantize their output are compared with those that give it, byte by byte.
    Kernels with an activation function are left out: what is on record are plain products.

    Args:
        kernels: Loaded kernels.
    """
    for name, gemm in kernels.gemms.items():
        for problem in problems_for(gemm):
            yield GemmResult(name, problem.judge(_run(gemm, problem, kernels.machine)))
        for packed in packed_problems(gemm):
            yield GemmResult(name, packed.judge(packed.call(gemm, kernels.machine)()))
    for output in output_problems(kernels):
        yield GemmResult(output.name, output.judge(kernels.machine))


def problems_for(gemm: Gemm) -> Sequence[GoldenProblem]:
    """Return the golden problems in the formats of a kernel, if it is one of CUTLASS's."""
    plain = gemm.activation == "none" and gemm.output in (torch.float32, torch.bfloat16)
    plain = plain and gemm.mode is None and gemm.quantizing is None
    return [problem for problem in GOLDEN if plain and _formats(problem) == _read_by(gemm)]


def time_gemms(kernels: CudaKernels) -> Iterator[Timing]:
    """Time every kernel that gives results on a CUDA device, with operands of random bytes."""
    for name, gemm in kernels.gemms.items():
        for size in () if gemm.quantizing else _TIMED:
            yield Timing(name, size, _microseconds(gemm, size, kernels.machine))


def _formats(problem: GoldenProblem) -> tuple[str, str, str]:
    a, b = problem.operands()
    block = problem.weight.block
    scale = f"block{block.block}:{block.format}" if block else "none"
    return a.held.format.name, b.held.format.name, scale


def _read_by(gemm: Gemm) -> tuple[str, str, str]:
    return gemm.a, gemm.b, gemm.scale


def _run(gemm: Gemm, problem: GoldenProblem, machine: Machine) -> Tensor:
    a, b = (matrix.stored() for matrix in problem.operands())
    stored = (a.codes, a.scales, b.codes, b.scales)
    parts = [None if part is None else part.to(machine.device) for part in stored]
    # The allocator gives the same memory again: what a kernel does not write is NaN then.
    torch.full((problem.m, problem.n), torch.nan, dtype=gemm.output, device=machine.device)
    return _call(gemm, parts, (problem.m, problem.n, a.k), machine)()


def _call(
    gemm: Gemm, parts: Sequence[Tensor | None], size: tuple[int, int, int], machine: Machine
) -> Callable[[], Tensor]:
    """Return the call of a product; one that adds something adds zeros."""
    zeros = torch.zeros(size[:2], dtype=gemm.output, device=machine.device)
    residual = zeros if gemm.residual else None
    return lambda: torch.ops.fpc_cuda.gemm(
        gemm.library, *parts, None, None, None, residual, None, 1.0, *size, machine.sms, gemm.output
    )


def _microseconds(gemm: Gemm, size: tuple[int, int, int], machine: Machine) -> float:
    call = _random_call(gemm, size, machine)
    times: list[float] = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(machine.device)
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def _random_call(gemm: Gemm, size: tuple[int, int, int], machine: Machine) -> Callable[[], Tensor]:
    if gemm.mode is not None:
        plain = replace(gemm, activation="none")  # only named: the kernel still computes its own
        (problem,) = packed_problems(plain, (size,))
        return problem.call(plain, machine)
    m, n, k = size
    parts: list[Tensor | None] = []
    for rows, element in ((m, gemm.a), (n, gemm.b)):
        parts.append(_bytes(rows * packed_bytes(k, FORMATS[element].storage_bits), machine))
        block = int(gemm.scale.partition(":")[0].removeprefix("block")) if ":" in gemm.scale else 0
        parts.append(_bytes(scale_bytes(rows, k // block), machine) if block else None)
    return _call(gemm, _shaped(parts, m, n), size, machine)


def _shaped(parts: Sequence[Tensor | None], m: int, n: int) -> list[Tensor | None]:
    a, a_scales, b, b_scales = parts
    assert a is not None
    assert b is not None
    return [a.view(m, -1), a_scales, b.view(n, -1), b_scales]


def _bytes(count: int, machine: Machine) -> Any:
    return torch.randint(0, 120, (count,), dtype=torch.uint8, device=machine.device)
