"""Libraries with the interface of compiled kernels that compute on the CPU, and their indices."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fpcompiler.artifact.kernels import (
    QUANTIZED_USES,
    Instance,
    LayerKernels,
    TargetKernels,
)
from fpcompiler.codegen.cuda.quantize import HEADERS, problem_text, structure_text
from fpcompiler.codegen.cutlass.instance import instances
from fpcompiler.codegen.cutlass.quantized import QuantizedOutput, problem_of
from fpcompiler.codegen.cutlass.record import describe
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Epilogue, OutputType, Rows
from fpcompiler.codegen.rebuild import describe_quantizers
from fpcompiler.codegen.torch_operators import build_operators
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.kernels import CudaKernels, open_target
from fpcompiler.runtime.cuda.layers import Machine
from fpcompiler.runtime.cuda.operators import load_operators
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.trust import Gatekeeper
from tests.codegen.cuda import problems

_HERE = Path(__file__).parent
_BLOCKS = {"none": (0, ""), "block32:f8E8M0FNU": (32, "f8E8M0FNU"),
           "block16:f8E4M3FN": (16, "f8E4M3FN")}  # fmt: skip
CPU = Machine(torch.device("cpu"), 4)


@functools.cache
def operators() -> Path:
    """Return the built library of operators, known to torch."""
    path = build_operators()
    load_operators(path)
    return path


def describe_gemm(
    weight: str,
    activation: str,
    arch: str,
    output: str,
    rows: Rows = Rows.DECODE,
    *,
    residual: bool = False,
) -> dict[str, Any]:
    """Return what an index says of the kernel for a pair of operands."""
    pair = Operand.parse(weight), Operand.parse(activation)
    options = {"output": OutputType(output), "epilogue": Epilogue(residual=residual)}
    problem = legalize("layer", *pair, (64, 64), arch, rows=rows, **options)
    return describe(instances(problem)[0])


def host_gemm(description: Mapping[str, Any], path: Path, abi: int = 1) -> Path:
    """Compile a GEMM for the CPU that reads what the described one reads."""
    block, scale = _BLOCKS[description["scale"]]
    a, b = (FORMATS[description[name]] for name in ("a", "b"))
    templates = resources.files("fpcompiler.codegen.cutlass") / "templates"
    output = {"f32": 4, "bf16": 2}[description["output"]]
    said = json.dumps(dict(description), sort_keys=True)
    # The name, so that the libraries of a model for few and for many rows differ.
    text = f"""char name[] = "{path.stem}";
static const char kDescription[] = R"json({said})json";
{(templates / "kernel_abi.h").read_text("utf-8").replace("#pragma once", "")}
{_quantizing(description)}
#include <cmath>
static const int kAbi = {abi}, kBlock = {block}, kOutputBytes = {output};
static const bool kResidual = {str(description["residual"]).lower()};
static const int kBitsA = {a.storage_bits}, kBitsB = {b.storage_bits};
static const float kValuesA[] = {{{_table(a.values)}}};
static const float kValuesB[] = {{{_table(b.values)}}};
static const float kScaleValues[] = {{{_table(FORMATS[scale].values) if scale else "1"}}};
{(_HERE / "host_gemm.cpp").read_text("utf-8")}"""
    return _compile(text, path)


def _quantizing(description: Mapping[str, Any]) -> str:
    """Return what quantizes outputs, compiled for the CPU; nothing for outputs themselves."""
    if "quantized" not in description:
        return "#define FPC_QUANTIZED 0"
    problem = problem_of(QuantizedOutput(**description["quantized"]), description["output"])
    templates = resources.files("fpcompiler.codegen.cutlass") / "templates"
    names = (*(name for name in HEADERS if name != "kernels.h"), "blocks.h")
    sources = [
        problems.HERE / "emulation.h" if name == "instructions.h" else problems.SOURCES / name
        for name in names
    ]
    parts = [(templates / "quantize_abi.h").read_text("utf-8")]
    parts += [source.read_text("utf-8") for source in sources]
    parts.append(f"namespace fpc {{ {structure_text(0, problem, 0)} }}")
    return "#define FPC_QUANTIZED 1\n#define FPC_CONVERTS 0\n" + "\n".join(parts)


def host_quantizers(wanted: Sequence[QuantizeProblem], path: Path) -> Path:
    """Compile the kernels that quantize for the CPU, where coroutines are the threads."""
    sources = [
        problems.HERE / "emulation.h" if name == "instructions.h" else problems.SOURCES / name
        for name in HEADERS
    ]
    text = "\n".join(source.read_text("utf-8") for source in sources)
    marker = 'extern "C" __attribute__((visibility("default"))) int fpc_on_host() { return 1; }'
    return _compile(f"{problems.levels()}{text}\n{problem_text(wanted, 1)}\n{marker}\n", path)


def instance(name: str, role: str, problem: Mapping[str, Any], library: Path) -> Instance:
    """Return an entry of an index."""
    sha256 = hashlib.sha256(library.read_bytes()).hexdigest()
    return Instance(name, role, problem, {"library": library.name}, sha256)


class Kernels:
    """Kernels for the CPU for some layers, as an artifact would hold them.

    Args:
        folder: Where libraries are made.
        weight, activation: Operands of the layers.
        arch: The architecture that they stand in for.
        output: The type of results.
        quantizers: What is quantized by kernels rather than by torch.
        residual: Whether the GEMMs add a tensor.
        quantized: What further GEMMs make of their output; None for no such.
    """

    def __init__(
        self,
        folder: Path,
        weight: str,
        activation: str,
        arch: str,
        output: str = "f32",
        quantizers: Sequence[QuantizeProblem] = (),
        *,
        residual: bool = False,
        quantized: QuantizedOutput | None = None,
    ) -> None:
        self.folder = folder
        self.libraries = {}
        found = []
        for rows in Rows:
            description = describe_gemm(weight, activation, arch, output, rows, residual=residual)
            library = host_gemm(description, folder / f"{rows.value}.so")
            self.libraries[rows.value] = library
            found.append(instance(rows.value, "gemm", description, library))
        for use, rows in zip(QUANTIZED_USES, Rows, strict=True) if quantized else ():
            plain = describe_gemm(weight, activation, arch, output, rows)
            description = {**plain, "quantized": asdict(quantized)}
            library = host_gemm(description, folder / f"{use}.so")
            self.libraries[use] = library
            found.append(instance(use, "gemm", description, library))
        if quantizers:
            library = host_quantizers(quantizers, folder / "quantize.so")
            self.libraries["quantize"] = library
            description = describe_quantizers(quantizers, arch)
            found.append(instance("quantize", "quantize", description, library))
        self.libraries["operators"] = operators()
        found.append(instance("operators", "operators", {}, operators()))
        self.instances = {item.name: item for item in found}
        self.arch = arch

    def files(self) -> dict[str, bytes]:
        """Return the libraries by the names of the index."""
        paths = self.libraries.values()
        return {path.name: path.read_bytes() for path in paths}

    def target(self, *layers: str) -> TargetKernels:
        """Return the index for some layers."""
        uses = {name: name for name in self.instances if name != "operators"}
        rows = {layer: LayerKernels(uses) for layer in layers}
        return TargetKernels(self.arch, ("0.0",), {}, self.instances, rows)

    def open(self, *layers: str) -> CudaKernels:
        """Return the kernels, loaded from a cache of their own."""
        gatekeeper = Gatekeeper(Options(cache=self.folder / "cache"), trust=True)
        return open_target(self.target(*layers), self.files(), CPU, gatekeeper)

    def calls(self, use: str) -> int:
        """Return how often the loaded GEMM for a use was run."""
        sha256 = self.instances[use].sha256
        library = ctypes.CDLL(str(self.folder / "cache" / "loaded" / f"{sha256}.so"))
        return int(library.fpc_host_calls())


def _compile(text: str, path: Path) -> Path:
    path.with_suffix(".cpp").write_text(text, encoding="utf-8")
    path.write_bytes(compiled(text))
    return path


@functools.cache
def compiled(text: str) -> bytes:
    """Return a library; tests need the same ones again and again."""
    command = [
        "g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden",
        "-Wno-psabi", "-Wno-unknown-pragmas", "-x", "c++", "-", "-o",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        subprocess.run([*command, str(path)], input=text.encode(), check=True)
        return path.read_bytes()


def _table(values: Sequence[float]) -> str:
    return ", ".join("NAN" if value != value else f"{value!r}f" for value in map(float, values))
