"""Weights of four bits in ggml, the library of llama.cpp, called as C through ctypes.

The weights are in the order that llama.cpp brings them into when it loads a model ("repacked"). A
graph multiplies with all copies of a weight, as in a model.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import weakref
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.cpu_linear.problem import (
    Builder,
    NotInstalledError,
    Problem,
    Work,
    require_multiple,
)

TYPES = {"f32": 0, "q4_0": 2, "mxfp4": 39}
"""``enum ggml_type``, checked against the names that the library gives."""


class _InitParams(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SILENCE = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
"""What is called with messages."""

_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_version": (c_char_p, ()),
    "ggml_log_set": (None, (c_void_p, c_void_p)),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}
_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
}


@dataclass(frozen=True)
class Ggml:
    """The two libraries, and the kind of memory in which weights are repacked."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL
    repacked: int


@lru_cache(maxsize=1)
def ggml() -> Ggml:
    """Return the libraries that the package llama_cpp brings along.

    Raises:
        NotInstalledError: If they are not there, or are too different from what is known here.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise NotInstalledError("llama_cpp is not installed")
    folder = Path(spec.origin).parent / "lib"
    try:
        base = _typed(folder / "libggml-base.so", _BASE)
        cpu = _typed(folder / "libggml-cpu.so", _CPU)
    except (OSError, AttributeError) as error:
        raise NotInstalledError(f"the ggml library of llama_cpp is not usable: {error}") from error
    for name, number in TYPES.items():
        if base.ggml_type_name(number) != name.encode():
            raise NotInstalledError(f"type {number} of this ggml is not {name}")
    base.ggml_log_set(_SILENCE, None)
    return Ggml(base, cpu, _repacked(base, cpu))


def _typed(path: Path, functions: dict[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _repacked(base: ctypes.CDLL, cpu: ctypes.CDLL) -> int:
    """Return the buffer type that repacks weights; it is one of the extra ones of the device."""
    register = cpu.ggml_backend_cpu_reg()
    device = base.ggml_backend_reg_dev_get(register, 0)
    name = b"ggml_backend_dev_get_extra_bufts"
    address = base.ggml_backend_reg_get_proc_address(register, name)
    if not address:
        raise NotInstalledError("this ggml cannot repack weights")
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
    # The list ends with a null pointer.
    for kind in itertools.takewhile(bool, listed) if listed else ():
        if base.ggml_backend_buft_name(kind) == b"CPU_REPACK":
            return int(kind)
    raise NotInstalledError("this ggml cannot repack weights")


@dataclass(frozen=True)
class _Context:
    """Tensors of a graph and their memory."""

    handle: int
    memory: list[int]

    def free(self) -> None:
        for buffer in self.memory:
            ggml().base.ggml_backend_buffer_free(buffer)
        ggml().base.ggml_free(self.handle)


class _Products:
    """A graph of products of one input and several weights, and what runs it."""

    def __init__(self, name: str, problem: Problem) -> None:
        base = ggml().base
        self._shape = len(problem.x), len(problem.weight)
        weight = _context(1 << 20)
        inputs = _context(1 << 20)
        n, k = problem.weight.shape
        first = base.ggml_new_tensor_2d(weight.handle, TYPES[name], k, n)
        self.weight_bytes = int(base.ggml_nbytes(first))
        self.count = problem.copies(self.weight_bytes)
        rest = (
            base.ggml_new_tensor_2d(weight.handle, TYPES[name], k, n) for _ in range(self.count - 1)
        )
        weights = [first, *rest]
        x = base.ggml_new_tensor_2d(inputs.handle, TYPES["f32"], k, len(problem.x))
        outputs = [base.ggml_mul_mat(inputs.handle, w, x) for w in weights]
        self._first = outputs[0]
        self._graph = base.ggml_new_graph(inputs.handle)
        for output in outputs:
            base.ggml_build_forward_expand(self._graph, output)
        _allocate(weight, ggml().repacked)
        _allocate(inputs, base.ggml_backend_cpu_buffer_type())
        codes = _quantized(name, problem.weight, self.weight_bytes)
        for tensor in weights:
            base.ggml_backend_tensor_set(tensor, codes.data_ptr(), 0, codes.nbytes)
        base.ggml_backend_tensor_set(x, problem.x.data_ptr(), 0, problem.x.nbytes)
        self._backend = ggml().cpu.ggml_backend_cpu_init()
        ggml().cpu.ggml_backend_cpu_set_n_threads(self._backend, problem.threads)
        for release in (weight.free, inputs.free):
            weakref.finalize(self, release)
        weakref.finalize(self, base.ggml_backend_free, self._backend)

    def run(self, _: int) -> None:
        """Multiply with all weights."""
        ggml().base.ggml_backend_graph_compute(self._backend, self._graph)

    def result(self) -> Tensor:
        """Return the first product, fp32 ``[M, N]``."""
        y = torch.empty(self._shape)
        ggml().base.ggml_backend_tensor_get(self._first, y.data_ptr(), 0, y.nbytes)
        return y


def _context(size: int) -> _Context:
    """Return memory for descriptions of tensors; what they hold is allocated later."""
    return _Context(ggml().base.ggml_init(_InitParams(size, None, True)), [])


def _allocate(context: _Context, kind: int) -> None:
    buffer = ggml().base.ggml_backend_alloc_ctx_tensors_from_buft(context.handle, kind)
    context.memory.append(buffer)


def _quantized(name: str, weight: Tensor, size: int) -> Tensor:
    codes = torch.empty(size, dtype=torch.uint8)
    source = weight.contiguous()
    ggml().base.ggml_quantize_chunk(
        TYPES[name], source.data_ptr(), codes.data_ptr(), 0, *source.shape, None
    )
    return codes


def ggml_product(name: str) -> Builder:
    """Return a builder of ggml's product with a type of :data:`TYPES`."""

    def build(problem: Problem) -> Work:
        ggml()
        require_multiple("N", len(problem.weight), 8)
        require_multiple("K", problem.weight.shape[1], 64)
        products = _Products(name, problem)
        count = products.count
        return Work(products.run, products.result, products.weight_bytes, count, count)

    return build
