"""What this machine can do at best, measured: how fast it reads memory, and how fast it multiplies.

On a CPU loops of the native library are timed, which do nothing else. Without that library, and on
CUDA, the copy and the matrix products of torch are, whose speed is a little less than the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from fpcompiler import native
from fpcompiler.native.linear import Arithmetic
from fpcompiler.runtime.clocks import clock_of

FAR_BYTES: Final = 128 << 20
"""What is read to measure memory: more than most caches hold, and little enough to allocate."""

NEAR_BYTES: Final = 64 << 10
"""The least that is read: a smaller set measures the call rather than the cache."""

_ITERATIONS: Final = 200_000
_SECONDS: Final = 0.05
_RUNS: Final = 5
_SIZE: Final = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of a machine.

    Attributes:
        source: What was timed: ``native`` loops, or the operators of ``torch``.
        threads: Threads of the CPU that were used.
        memory: Bytes per second, read from a set that no cache holds (:data:`FAR_BYTES`).
        set_bytes: The size of the working set of the model, at most :data:`FAR_BYTES`.
        set_read: Bytes per second, read again and again from a set of that size: more than
            ``memory`` where a cache holds it.
        peaks: Operations per second by the name of the arithmetic; a product and a sum are two.
    """

    source: str
    threads: int
    memory: float
    set_bytes: int
    set_read: float
    peaks: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def measure_ceilings(device: torch.device, set_bytes: int) -> Ceilings:
    """Measure a machine; it takes about a second.

    Args:
        device: Of which device.
        set_bytes: How much memory a call of the model reads.
    """
    near = min(max(set_bytes, NEAR_BYTES), FAR_BYTES)
    library = native.library() if device.type == "cpu" else None
    if library is None:
        return _with_torch(device, near)
    return _with_library(library.functions, near)


def _with_library(functions: Any, near: int) -> Ceilings:
    threads = torch.get_num_threads()
    data = torch.ones(FAR_BYTES, dtype=torch.uint8)
    cpu = torch.device("cpu")

    def read(size: int) -> float:
        return size / _best(lambda: functions.fpc_read_bytes(data.data_ptr(), size, threads), cpu)

    def peak(arithmetic: Arithmetic) -> float:
        call = int(arithmetic), _ITERATIONS, threads
        # The number of operations is what the function returns.
        return float(functions.fpc_peak(*call)) / _best(lambda: functions.fpc_peak(*call), cpu)

    peaks = {arithmetic.name.lower(): peak(arithmetic) for arithmetic in Arithmetic}
    return Ceilings("native", threads, read(FAR_BYTES), near, read(near), peaks)


def _with_torch(device: torch.device, near: int) -> Ceilings:
    source = torch.ones(FAR_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(size: int) -> float:
        # Half of the set is read and the other half is written.
        half = size // 2
        return 2 * half / _best(lambda: target[:half].copy_(source[:half]), device)

    peaks = {
        Arithmetic.INT8.name.lower(): _matmul(torch._int_mm, torch.int8, device),
        Arithmetic.BF16.name.lower(): _matmul(torch.mm, torch.bfloat16, device),
        Arithmetic.FLOAT32.name.lower(): _matmul(torch.mm, torch.float32, device),
    }
    return Ceilings("torch", torch.get_num_threads(), copy(FAR_BYTES), near, copy(near), peaks)


def _matmul(multiply: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> float:
    size = _SIZE.get(device.type, _SIZE["cpu"])
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: multiply(a, a), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several runs: others only had less of the machine."""
    clock, times, spent = clock_of(device), list[float](), 0.0
    work()
    while len(times) < _RUNS or spent < _SECONDS:
        first = clock.mark()
        work()
        second = clock.mark()
        clock.wait()
        times.append(clock.seconds(first, second))
        spent += times[-1]
    return min(times)
