"""CUTLASS's host reference as a library: what its headers say that bytes mean, without a GPU.

``host_reference.cpp`` is compiled with g++ against the headers of the package ``nvidia-cutlass``
and of the CUDA toolkit, once, into ``proof/`` in the folder of compiled kernels (``FPC_CACHE``).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import DependencyError, NumericsError
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.kernel_layout import scale_bytes
from fpcompiler.options import Options

_SOURCE: Final = Path(__file__).with_name("host_reference.cpp")
_FLAGS: Final = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
# Some of the headers' templates, never used here, name functions that only nvcc knows.
_FOREIGN: Final = ("-fpermissive", "-w")
_TOOLKIT: Final = Path("/usr/local/cuda")

TYPES: Final = {
    "f4E2M1FN": 0, "f6E2M3FN": 1, "f6E3M2FN": 2, "f8E4M3FN": 3, "f8E5M2": 4, "f8E8M0FNU": 5,
    "f8E4M3FNU": 6,
}  # fmt: skip
"""The formats that CUTLASS has types for, and their numbers in ``host_reference.cpp``."""

_SCALES: Final = {"f8E8M0FNU": (TYPES["f8E8M0FNU"], 32), "f8E4M3FN": (TYPES["f8E4M3FNU"], 16)}
_UNSCALED: Final = -1


class _Problem(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p), ("scales_a", ctypes.c_void_p),
        ("b", ctypes.c_void_p), ("scales_b", ctypes.c_void_p),
        ("d", ctypes.c_void_p), ("m", ctypes.c_int), ("n", ctypes.c_int), ("k", ctypes.c_int),
        ("alpha", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored:
    """One operand as a kernel reads it.

    Attributes:
        codes: uint8 ``[rows, bytes]``, packed.
        spec: The format of the codes.
        scales: Block scales in tiles, uint8; None for none.
        scale_format: Their format: ``f8E8M0FNU`` (per 32 values) or ``f8E4M3FN`` (per 16).
    """

    codes: Tensor
    spec: FloatSpec
    scales: Tensor | None = None
    scale_format: str = ""

    @property
    def k(self) -> int:
        """Codes in a row."""
        return self.codes.shape[1] * 8 // self.spec.storage_bits


@dataclass(frozen=True, eq=False)
class HostReference:
    """The compiled library."""

    functions: ctypes.CDLL

    @property
    def cutlass_version(self) -> str:
        """The version of the headers: ``4.2.0``."""
        number = int(self.functions.fpc_cutlass_version())
        return f"{number // 100}.{number // 10 % 10}.{number % 10}"

    def gemm(self, a: Stored, b: Stored, alpha: float = 1.0) -> Tensor:
        """Return ``alpha * a @ b.T``, added in fp32 along K.

        Args:
            a: ``[M, K]``.
            b: ``[N, K]``.
            alpha: A factor.

        Returns:
            fp32 ``[M, N]``.

        Raises:
            NumericsError: If the operands do not fit each other, or CUTLASS has no such kernel.
        """
        if a.k != b.k or a.scale_format != b.scale_format:
            raise NumericsError(
                f"K {a.k} with scales {a.scale_format or 'none'} cannot be multiplied by "
                f"K {b.k} with scales {b.scale_format or 'none'}."
            )
        scale_type, block = _SCALES.get(a.scale_format, (_UNSCALED, 0))
        d = torch.zeros(a.codes.shape[0], b.codes.shape[0])
        # The problem holds addresses only; these keep the memory.
        kept = [_readable(t) for t in (a.codes, a.scales, b.codes, b.scales)]
        if block:
            _require_scales(a, block)
            _require_scales(b, block)
        addresses = [None if t is None else t.data_ptr() for t in kept]
        problem = _Problem(*addresses, d.data_ptr(), *d.shape, a.k, alpha)
        types = (TYPES.get(a.spec.name, -1), TYPES.get(b.spec.name, -1))
        if self.functions.fpc_gemm(*types, scale_type, ctypes.byref(problem)):
            raise NumericsError(
                f"CUTLASS has no reference for {a.spec} by {b.spec} with scales "
                f"{a.scale_format or 'none'}."
            )
        return d

    def decode(self, packed: Tensor, spec: FloatSpec, count: int) -> Tensor:
        """Return the values of packed codes, fp32 ``[count]``.

        Raises:
            NumericsError: If CUTLASS has no type for the format, or the codes are fewer.
        """
        flat = packed.contiguous().view(-1)
        if flat.numel() * 8 < count * spec.storage_bits:
            raise NumericsError(f"{flat.numel()} bytes do not hold {count} codes of {spec}.")
        values = torch.empty(count)
        self._convert(self.functions.fpc_decode, spec, flat, values, count)
        return values

    def encode(self, values: Tensor, spec: FloatSpec) -> Tensor:
        """Return the codes of values, uint8, one a byte, as CUTLASS rounds them.

        Raises:
            NumericsError: If CUTLASS has no type for the format.
        """
        flat = values.float().contiguous()
        codes = torch.empty(flat.shape, dtype=torch.uint8)
        self._convert(self.functions.fpc_encode, spec, flat, codes, flat.numel())
        return codes

    def scale_indices(self, block: int, rows: int, k: int, *, weights: bool) -> Tensor:
        """Return in which byte the scale of each value is, by CUTLASS's layout; int64 ``[R, K]``.

        Args:
            block: Values in a block: 16 or 32.
            rows: R.
            k: K.
            weights: The layout of B's scales rather than A's.
        """
        out = torch.empty(rows, k, dtype=torch.int64)
        pointer = ctypes.c_void_p(out.data_ptr())
        if self.functions.fpc_scale_indices(block, rows, k, int(weights), pointer):
            raise NumericsError(f"CUTLASS has no scales for blocks of {block} values.")
        return out

    def _convert(
        self,
        function: ctypes._NamedFuncPointer,
        spec: FloatSpec,
        source: Tensor,
        out: Tensor,
        n: int,
    ) -> None:
        pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        if function(TYPES.get(spec.name, -1), *pointers, ctypes.c_int64(n)):
            raise NumericsError(f"CUTLASS has no type for {spec}; types: {', '.join(TYPES)}.")


def why_missing() -> str:
    """Return what is missing to build the library; empty if nothing is."""
    if not shutil.which("g++"):
        return "there is no g++"
    if _cutlass() is None:
        return "there are no headers of CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0"
    if cuda_headers() is None:
        return "there are no headers of the CUDA toolkit: install nvcc 13"
    return ""


def host_reference(options: Options | None = None) -> HostReference:
    """Return the library, compiled if this source was not compiled before.

    Args:
        options: Where compiled kernels are; by default as the environment says.

    Raises:
        DependencyError: If the compiler or the headers are missing, or do not compile.
    """
    reason = why_missing()
    if reason:
        raise DependencyError(f"CUTLASS's host reference cannot be built: {reason}.")
    path = (options or Options.from_env()).cache / "proof" / f"host-{_key()}.so"
    if not path.is_file():
        _build(path)
    return HostReference(ctypes.CDLL(str(path)))


def _build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may do the same: each has its own file, and the last name given wins.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        includes = [f"-I{folder}" for folder in _folders()]
        command = ["g++", *_FLAGS, *_FOREIGN, *includes, str(_SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DependencyError(
                f"g++ could not compile CUTLASS's host reference:\n{done.stderr[-2000:]}"
            )
        os.replace(built, path)


def _key() -> str:
    """Return a hash of everything that decides what is compiled."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    cutlass, _, cuda, _ = _folders()
    versions = (cutlass / "cutlass/version.h", cuda / "cuda_runtime_api.h")
    sources = [path.read_bytes() for path in (_SOURCE, *versions)]
    parts = [*sources, " ".join(_FLAGS).encode(), compiler]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _folders() -> tuple[Path, Path, Path, Path]:
    """Return where headers are: CUTLASS's, those of its tools, CUDA's, those of its C++ library."""
    cutlass, cuda = _cutlass(), cuda_headers()
    assert cutlass is not None
    assert cuda is not None
    return cutlass / "include", cutlass / "tools/util/include", cuda, cuda / "cccl"


def _cutlass() -> Path | None:
    found = importlib.util.find_spec("cutlass_library")
    if found is None or found.origin is None:
        return None
    source = Path(found.origin).parent / "source"
    return source if (source / "include/cutlass/cutlass.h").is_file() else None


def cuda_headers() -> Path | None:
    """Return the folder of the CUDA toolkit's headers, or None."""
    nvcc = shutil.which("nvcc")
    toolkits = [Path(nvcc).resolve().parents[1]] if nvcc else []
    includes = [folder / "include" for folder in (*toolkits, _TOOLKIT)]
    return next((i for i in includes if (i / "cuda_runtime.h").is_file()), None)


def _readable(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu().contiguous()


def _require_scales(operand: Stored, block: int) -> None:
    size = scale_bytes(operand.codes.shape[0], -(-operand.k // block))
    if operand.scales is None or operand.scales.numel() != size:
        raise NumericsError(f"{operand.codes.shape[0]} rows of {operand.k} have {size} scales.")
