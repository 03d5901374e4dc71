"""The library for ARM, cross-compiled and emulated, against the definition and the library here."""

from __future__ import annotations

import ctypes
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from fpcompiler.native import INSTRUCTION_SETS, library
from fpcompiler.native.linear import Arithmetic, Producer
from fpcompiler.numerics import quantize_packed
from fpcompiler.numerics.compiled import INPUTS
from fpcompiler.operand import Operand
from fpcompiler.runtime.native import NativeLinear
from tests.native.guarded import Guarded
from tests.native.test_functions import evaluate, sweep
from tests.runtime.test_native import both, case

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
NATIVE = library()
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)}"),
    pytest.mark.skipif(NATIVE is None, reason="the native library was not built"),
]

NEON = INSTRUCTION_SETS.index("NEON dot product")
# What the library here runs the same layers with; ARM has no arithmetic in bf16.
HERE = min(NATIVE.instructions, INSTRUCTION_SETS.index("AVX-512 VNNI")) if NATIVE else 0
HEADS = 7  # FpcHead
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAGS = """
import json, setuptools
from distutils.core import run_setup
library = run_setup("setup.py", stop_after="init").ext_modules[0]
print(json.dumps([*library.extra_compile_args, *library.extra_link_args, *library.sources]))
"""
# Weights and activations; the last three are summed in fp32.
KINDS = (
    ("e2m1@row:f32", "e2m3@token:f32"),
    ("e2m1@row:f32", "e2m1@tensor:f32/block16:e4m3"),
    ("e2m1@row:f32/block32:e8m0", "e2m3@block32:e8m0"),
    ("e2m1@row:f32/block32:e8m0", "e2m3@token:f32"),
    ("e2m1@tensor:f32/block16:e4m3", "e2m1@tensor:f32/block16:e4m3"),
    ("e2m1@block128:f32", "e2m3@block32:e8m0"),
    ("e2m1@block128:f32", "e1m6@token:f32"),
    ("e3m0@row:f32", "e1m6@token:f32"),
    ("e1m2@row:f32/block64:e8m0", "e1m4@block64:f32"),
    ("e1m6@row:f32", "e1m6@token:f32"),
    ("e1m4@row:f32/block64:e8m0", "e2m3@block32:e8m0"),
    ("e2m3@block32:e8m0", "e2m3@block16:e4m3"),
    ("e2m1@row:f32/block32:e8m0", ""),
    ("e2m1@tensor:f32/block16:e4m3", "e4m3@block32:e8m0"),
    ("e3m2@row:f32", "e3m2@token:f32"),
)
OUTPUTS, LENGTHS = (130, 1, 100, 65, 7, 64, 200), (130, 520, 31, 257, 1, 64, 40)


@dataclass(frozen=True)
class Layer:
    """A layer and a call of it; weights are multiplied by a power of two."""

    n: int
    k: int
    m: int
    weight: str
    inputs: str
    dtype: torch.dtype = torch.float32
    threads: int = 1
    power: int = 0
    bias: bool = True


@dataclass(frozen=True)
class Call:
    """What a layer is for the driver, and what the results are compared with."""

    layer: Layer
    native: NativeLinear
    message: bytes = field(repr=False)
    prepared: list[bytes] = field(repr=False)
    result: Tensor = field(repr=False)
    expected: Tensor = field(repr=False)
    bound: Tensor = field(repr=False)

    @property
    def exact(self) -> bool:
        """Whether the definition has one result, whatever the order of sums."""
        return self.native.kind.arithmetic is Arithmetic.INT8 and not self.native.kind.group

    @property
    def fused(self) -> bool:
        """Whether kernels here add products of integers and scales as those for NEON do."""
        bits = Operand.parse(self.layer.weight).format.storage_bits
        least = "AVX2" if bits == 4 else "AVX-512 VNNI"
        integers = self.native.kind.arithmetic is Arithmetic.INT8
        return integers and INSTRUCTION_SETS.index(least) <= HERE


def layers() -> Iterator[Layer]:
    """Return every kind with every number of rows up to 17, and what is special."""
    for index, (weight, inputs) in enumerate(KINDS):
        for m in range(1, 18):
            n, k = OUTPUTS[(m + index) % 7], LENGTHS[(2 * m + index) % 7]
            dtype = DTYPES[(m + index) % 3]
            yield Layer(n, k, m, weight, inputs, dtype, bias=m % 2 == 0)
    row, mx = KINDS[0], KINDS[2]
    yield Layer(70, 16384, 3, *row)
    for kind in (row, mx, KINDS[9], KINDS[12]):
        yield Layer(90, 1300, 1, *kind, threads=3)
        yield Layer(90, 1300, 7, *kind, threads=3)
        yield Layer(66, 96, 103, *kind, threads=3)
    for power in (-100, -20, 60, 100):
        yield Layer(70, 96, 8, *mx, power=power)


def call_of(layer: Layer) -> Call:
    """Return the layer as the library here runs it."""
    assert NATIVE is not None
    weight = Operand.parse(layer.weight)
    inputs = Operand.parse(layer.inputs) if layer.inputs else None
    w, x = case(layer.n, layer.k, layer.m, layer.dtype)
    w = w * 2.0**layer.power
    bias = torch.linspace(-1, 1, layer.n) if layer.bias else None
    native, result, expected, bound = both(w, x, weight, inputs, HERE, bias)
    prepared = [prepare(native, x, head) for head in (None, *range(HEADS))]
    packed, scales = quantize_packed(w, weight)
    parts = [packed, scales[-1] if weight.block else torch.empty(0), native._scale]
    parts += [torch.zeros_like(native._scale) if native._bias is None else native._bias, x]
    dtype = INPUTS[layer.dtype]
    repeat = weight.block.block // native.kind.group if weight.block else 1
    shape = struct.pack(
        "=8q", layer.m, packed.shape[1], parts[1].nbytes, repeat, dtype, dtype, layer.bias,
        layer.threads,
    )  # fmt: skip
    structures = [bytes(structure) for structure in native.structures]
    message = b"".join([shape, *structures, *map(raw, parts)])
    return Call(layer, native, message, prepared, result, expected, bound)


def prepare(native: NativeLinear, x: Tensor, head: int | None) -> bytes:
    """Return activations as the library here prepares them, or what a head computes of them."""
    rows, k = x.shape
    memory = Guarded(native.prepared_bytes(rows), True, 64)
    ctypes.memset(memory.address, 0, native.prepared_bytes(rows))
    producer = None if head is None else ctypes.byref(Producer(head=head, eps=1e-5))
    status = native._prepare_produced(
        native._weights, native._activations, producer, None, None, x.data_ptr(),
        INPUTS[x.dtype], rows, k, memory.address, 1, HERE,
    )  # fmt: skip
    assert status == 0
    return memory.read()


def raw(tensor: Tensor) -> bytes:
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return [call_of(layer) for layer in layers()]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the driver with the whole library, built as setup.py does it but for ARM."""
    found = subprocess.run(
        [sys.executable, "-c", FLAGS], cwd=ROOT, check=True, capture_output=True, text=True
    )
    program = tmp_path_factory.mktemp("neon") / "driver"
    source = str(Path(__file__).with_name("neon_driver.cpp"))
    include = f"-I{ROOT / 'fpcompiler/native/csrc'}"
    flags = [*json.loads(found.stdout), "-Werror", "-static", include, source]
    built = subprocess.run(
        [COMPILER, *flags, "-o", str(program)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return program


class Results:
    """What the driver wrote, read in order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        assert len(part) == size
        self._at += size
        return part

    def ended(self) -> bool:
        return self._at == len(self._data)


def emulate(driver: Path, processor: str, calls: list[Call]) -> Results:
    """Return the results of the driver on an emulated processor."""
    x = numpy.ascontiguousarray(sweep()[::97])
    given = driver.with_suffix(f".{processor}.cases")
    results = driver.with_suffix(f".{processor}.results")
    start = struct.pack("=q", len(x)) + x.tobytes()
    given.write_bytes(b"".join([start, *(call.message for call in calls)]))
    subprocess.run([EMULATOR, "-cpu", processor, str(driver), given, results], check=True)
    return Results(results.read_bytes())


def check_beginning(results: Results, level: int, operations: tuple[int, int, int]) -> None:
    """Check the instruction set, the loops that measure the machine, and functions."""
    assert results.take(28) == struct.pack("=i3q", level, *operations)
    x = numpy.ascontiguousarray(sweep()[::97])
    for function in range(3):
        assert results.take(x.nbytes) == evaluate(function, x, 0).tobytes()


def check(call: Call, results: Results, fused: bool) -> None:
    """Compare prepared activations bit for bit, and products as exactly as they are defined."""
    plain, *produced = call.prepared
    assert results.take(len(plain)) == plain
    buffer = bytearray(results.take(call.result.nbytes))
    result = torch.frombuffer(buffer, dtype=call.layer.dtype).view_as(call.result)
    if call.exact:
        assert torch.equal(result, call.expected)
    if fused:
        assert torch.equal(result, call.result)
    assert bool(((result.double() - call.expected.double()).abs() <= call.bound).all())
    for prepared in produced:
        assert results.take(len(prepared)) == prepared


def test_kernels_for_neon_give_the_bits_of_the_others(driver: Path, calls: list[Call]) -> None:
    results = emulate(driver, "max", calls)
    check_beginning(results, NEON, (12 * 32, 12 * 8, 12 * 8))
    for call in calls:
        check(call, results, call.fused)
    assert results.ended()


def test_a_processor_without_dot_products_runs_the_portable_kernels(
    driver: Path, calls: list[Call]
) -> None:
    few = [call for call in calls if call.layer.m in {1, 4} and call.layer.k < 1000]
    results = emulate(driver, "cortex-a72", few)
    check_beginning(results, 0, (12 * 8, 12 * 8, 12 * 8))
    for call in few:
        check(call, results, fused=False)
    assert results.ended()


def test_cases_have_every_arithmetic_and_kind_of_scales(calls: list[Call]) -> None:
    kinds = {(call.native.kind.arithmetic, call.native.kind.group) for call in calls}
    integers = {(Arithmetic.INT8, group) for group in (0, 16, 32, 64, 128)}
    assert kinds >= {*integers, (Arithmetic.FLOAT32, 0), (Arithmetic.FLOAT32, 16)}
    assert {call.layer.m for call in calls} >= set(range(1, 18))
