"""Problems that quantizers are tested with, and libraries of them for the CPU and for a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fpcompiler.codegen.cuda.quantize import HEADERS, problem_text, quantize_source
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand, ScaleRounding
from fpcompiler.runtime.cuda import QuantizeLibrary, QuantizeProblem
from fpcompiler.runtime.cuda.problem import TYPES
from fpcompiler.runtime.cuda.stored import BF16, I8, why_not
from fpcompiler.runtime.fused import HEADS, PRODUCERS, SLOTS, TAILS

HERE = Path(__file__).parent
SOURCES = Path(__file__).parents[3] / "codegen" / "cuda"
ELEMENTS = tuple(spec for spec in FORMATS.values() if spec.zero and spec.signed)
ROUNDINGS = tuple(mode.value for mode in ScaleRounding)


def scales() -> list[str]:
    """Return every kind of scale with every rounding."""
    kinds = ["", "token:f32", "tensor:f32", "block128:f32", "block16:f32"]
    kinds += [f"block32:f8E8M0FNU:{mode}" for mode in ROUNDINGS]
    kinds += [f"token:f32/block32:f8E8M0FNU:{mode}" for mode in ROUNDINGS]
    kinds += [f"tensor:f32/block16:f8E4M3FN:{mode}" for mode in ROUNDINGS]
    kinds += [f"block16:f8E4M3FN:{mode}" for mode in ROUNDINGS]
    kinds += ["block64:f8E8M0FNU", "tensor:f32/block128:f8E8M0FNU", "row:f32/block64:f8E4M3FN:mse"]
    return kinds


def operand(element: str, scale: str) -> Operand:
    return Operand.parse(f"{element}@{scale}" if scale else element)


def formats() -> list[QuantizeProblem]:
    """Return every element format with each way in which its codes depend on values."""
    kinds = ("token:f32", "block32:f8E8M0FNU", "tensor:f32/block16:f8E4M3FN:mse")
    found = [QuantizeProblem(Operand(spec), "f32") for spec in ELEMENTS]
    for i, spec in enumerate(ELEMENTS):
        for j, kind in enumerate(kinds):
            found.append(QuantizeProblem(operand(spec.name, kind), TYPES[(i + j) % 3]))
    return found


def all_scales(elements: Sequence[str], types: Sequence[str]) -> list[QuantizeProblem]:
    """Return every kind of scale, swizzled where that is possible."""
    found = []
    for element in elements:
        for i, scale in enumerate(scales()):
            own, type = operand(element, scale), types[i % len(types)]
            found.append(QuantizeProblem(own, type))
            if own.block and not own.block.is_real and own.block.block in (16, 32):
                found.append(QuantizeProblem(own, types[(i + 1) % len(types)], swizzled=True))
    return found


def special() -> list[QuantizeProblem]:
    """Return codes in E4M3 bytes, and scales that are given."""
    found = [
        QuantizeProblem(operand(element, scale), "bf16", stored="f8E4M3FN")
        for element in ("f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f4E3M0FN", "f4E1M2FN")
        for scale in ("token:f32", "block32:f8E8M0FNU")
    ]
    given = ("tensor:f32", "tensor:f32/block16:f8E4M3FN", "tensor:f32/block32:f8E8M0FNU")
    formats = ("f6E3M2FN", "f4E2M1FN", "f6E2M3FN")
    found += [
        QuantizeProblem(operand(name, scale), "bf16", given=True)
        for name, scale in zip(formats, given, strict=True)
    ]
    found.append(QuantizeProblem(operand("f8E4M3FN", "tensor:f32"), "f32", given=True))
    return found


def stored() -> list[QuantizeProblem]:
    """Return integers and products: of all formats, and of one with every kind of scale."""
    kinds = ("token:f32", "block32:f8E8M0FNU", "tensor:f32/block16:f8E4M3FN:mse")
    pairs = [(spec.name, scale) for spec in ELEMENTS for scale in kinds]
    pairs += [("f6E2M3FN", scale) for scale in scales()]
    found = [
        QuantizeProblem(operand(*pair), TYPES[i % 3], stored=name)
        for i, pair in enumerate(dict.fromkeys(pairs))
        for name in (I8, BF16)
        if not why_not(operand(*pair), name)
    ]
    own = operand("f4E2M1FN", "tensor:f32/block16:f8E4M3FN")
    return [*found, QuantizeProblem(own, "bf16", stored=BF16, given=True)]


def stored_of_producers(names: Sequence[str] = tuple(PRODUCERS)) -> list[QuantizeProblem]:
    """Return integers and products of what producers and Hadamard transforms make."""
    plain = [*produced(("bf16",), names), *rotated()]
    forms = ((I8, "token:f32"), (BF16, "tensor:f32/block16:f8E4M3FN"), (BF16, "block32:f8E8M0FNU"))
    return [
        replace(problem, operand=operand(problem.operand.format.name, scale), stored=name)
        for i, problem in enumerate(plain)
        for name, scale in (forms[0], forms[1 + i % 2])
    ]


def produced(
    types: Sequence[str], names: Sequence[str] = tuple(PRODUCERS)
) -> list[QuantizeProblem]:
    """Return every producer with all that it may read."""
    found = []
    for i, name in enumerate(names):
        producer = PRODUCERS[name]
        needed, optional = TAILS[producer.tail]
        read = {*HEADS[producer.head], *needed, *optional}
        for type in types:
            beside = tuple(type if slot in read else "" for slot in SLOTS)
            scale = ("token:f32", "block32:f8E8M0FNU", "tensor:f32/block16:f8E4M3FN")[i % 3]
            own = operand("f6E2M3FN", scale)
            found.append(QuantizeProblem(own, type, name, beside))  # type: ignore[arg-type]
    return found


def mixed() -> list[QuantizeProblem]:
    """Return producers whose tensors differ in type."""
    own = operand("f6E2M3FN", "token:f32")
    return [
        QuantizeProblem(own, "bf16", "rms_norm_modulate", ("f32", "", "bf16", "bf16")),
        QuantizeProblem(own, "f16", "rms_norm_mul", ("f16", "", "bf16", "")),
        QuantizeProblem(own, "bf16", "layer_norm_modulate", ("f32", "f32", "bf16", "f32")),
        QuantizeProblem(own, "f32", "silu_add", ("", "", "", "f16")),
    ]


def rotated() -> list[QuantizeProblem]:
    """Return Hadamard transforms, alone and behind a producer."""
    kinds = (
        (16, "token:f32"),
        (32, "block32:f8E8M0FNU"),
        (64, "token:f32"),
        (128, "block16:f8E4M3FN"),
    )
    found = [
        QuantizeProblem(operand("f4E2M1FN", scale), type, hadamard=block)
        for (block, scale), type in zip(kinds, ("bf16", "f32", "f16", "f32"), strict=True)
    ]
    own = operand("f4E2M1FN", "token:f32/block32:f8E8M0FNU")
    found.append(QuantizeProblem(own, "bf16", "silu_mul", ("", "", "bf16", ""), hadamard=32))
    return found


def levels(level: int = 1) -> str:
    """Return what emulated kernels are told: they are on Hopper, and how they may convert."""
    return f"#define FPC_CONVERTS {level}\n#define FPC_FOLLOWS 1\n"


def emulated(problems: Sequence[QuantizeProblem], folder: Path, level: int = 1) -> QuantizeLibrary:
    """Compile kernels for the CPU, where coroutines are the threads, as they are on Hopper.

    Args:
        problems: What they compute.
        folder: Where source and library go.
        level: Of instructions that convert; 0 without any.
    """
    files = [HERE / "emulation.h" if n == "instructions.h" else SOURCES / n for n in HEADERS]
    files += [HERE / name for name in ("values.h", "hard_quotients.h", "exponentials.h")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    source, library = folder / "emulated.cpp", folder / "emulated.so"
    functions = problem_text(problems, level) + _values(len(problems))
    source.write_text(f"{levels(level)}{text}\n{functions}")
    command = [
        "g++", "-std=c++17", "-O0", "-ffp-contract=off", "-Wall", "-Werror", "-fPIC", "-shared",
        "-Wno-unknown-pragmas", "-Wno-psabi", str(source), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return QuantizeLibrary(library, problems)


def compiled(
    problems: Sequence[QuantizeProblem],
    folder: Path,
    arch: str,
    *,
    software: bool = False,
    jobs: int = 1,
) -> list[tuple[QuantizeLibrary, int]]:
    """Compile kernels for a GPU, and return where each problem is."""
    size = -(-len(problems) // jobs)
    parts = [problems[i : i + size] for i in range(0, len(problems), size)]

    def build(index: int) -> QuantizeLibrary:
        part = parts[index]
        made = quantize_source(part, arch, software=software)
        extra = (HERE / "values.h").read_text(encoding="utf-8") + _values(len(part))
        source = folder / f"{arch}-{software}-{index}.cu"
        source.write_text(made.text + extra)
        build_library(source, made.flags, arch)
        return QuantizeLibrary(source.with_suffix(".so"), part)

    with ThreadPoolExecutor(jobs) as pool:
        libraries = list(pool.map(build, range(len(parts))))
    return [(libraries[i // size], i % size) for i in range(len(problems))]


def build_library(source: Path, flags: Sequence[str], arch: str) -> str:
    """Compile one source, and return what ptxas says of each kernel."""
    suffix = arch.removeprefix("sm_")
    nvcc = shutil.which("nvcc")
    assert nvcc
    command = [
        nvcc, *flags, "-O3", "-shared", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        f"-gencode=arch=compute_{suffix},code=[sm_{suffix},compute_{suffix}]",
        str(source), "-o", str(source.with_suffix(".so")),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stderr


def _values(count: int) -> str:
    cases = "".join(
        f"    if (problem == {i}) return fpc::values<fpc::Problem{i}>(*arguments, to, stream);\n"
        for i in range(count)
    )
    return (
        'extern "C" __attribute__((visibility("default"))) int32_t fpc_test_values(\n'
        "    int32_t problem, const FpcQuantizeArguments* arguments, float* to, void* stream) {\n"
        f"{cases}    return FPC_REFUSED;\n}}\n"
    )


def quotients(library: QuantizeLibrary, x: Tensor, totals: Tensor) -> Tensor:
    """Return ``x / totals[:, None]`` as kernels compute it, for fp32 ``x`` of 16 columns."""
    out = torch.empty_like(x)
    function = library._library.fpc_test_quotients
    function.argtypes = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_void_p)
    addresses = (x.data_ptr(), totals.data_ptr(), out.data_ptr())
    assert function(*addresses, len(x), None) == 0
    return out


def write_values(
    library: QuantizeLibrary, index: int, arguments: ctypes.Structure, to: int, stream: int
) -> None:
    """Call the function that tests add to a library: the values that are quantized, as fp32."""
    function = library._library.fpc_test_values
    function.argtypes = (ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    assert function(index, ctypes.addressof(arguments), to, stream) == 0
