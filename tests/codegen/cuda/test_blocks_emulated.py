"""Blocks that one thread quantizes, compiled for the CPU: the bytes of numerics."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.codegen.cuda.quantize import HEADERS, structure_text
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import encode, quantize
from fpcompiler.operand import Operand, ScaleRounding
from fpcompiler.runtime import fused
from fpcompiler.runtime.cuda import QuantizeProblem
from tests.codegen.cuda import problems

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

BLOCK = 32
ELEMENTS = ("f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN", "f8E5M2")
PROBLEMS = [
    QuantizeProblem(
        Operand.parse(f"{element}@block{BLOCK}:f8E8M0FNU:{mode.value}"), "bf16", swizzled=True
    )
    for element in ELEMENTS
    for mode in ScaleRounding
]
PRODUCED = [
    QuantizeProblem(Operand.parse("f6E2M3FN@block32:f8E8M0FNU"), type, name, swizzled=True)
    for name in ("", *fused.ACTIVATIONS)
    for type in ("f32", "f16", "bf16")
]
ALL = [*PROBLEMS, *PRODUCED]
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

CALLS = """
template <class P>
static void run(const float* from, int64_t blocks, float* values, float* quotients, uint8_t* codes,
                uint8_t* finite) {
    using namespace fpc;
    for (int64_t b = 0; b < blocks; b++) {
        float own[P::kBlock];
        for (int i = 0; i < P::kBlock; i++)
            values[b * P::kBlock + i] = own[i] = produced_of<P>(from[b * P::kBlock + i]);
        const ScaledBlock<P> block(own);
        codes[b] = block.code, finite[b] = block.finite;
        for (int i = 0; i < P::kBlock; i++)
            quotients[b * P::kBlock + i] = block.quotient(own[i]);
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    names = (*(name for name in HEADERS if name != "kernels.h"), "blocks.h")
    parts = ["#define FPC_CONVERTS 0"]
    for name in names:
        emulated = name == "instructions.h"
        source = problems.HERE / "emulation.h" if emulated else problems.SOURCES / name
        parts.append(source.read_text("utf-8"))
    structures = "".join(structure_text(i, problem, 0) for i, problem in enumerate(ALL))
    parts += ["namespace fpc {", structures, "}", CALLS]
    cases = "".join(
        f"case {i}: return run<fpc::Problem{i}>(from, blocks, values, quotients, codes, finite);\n"
        for i in range(len(ALL))
    )
    parts.append(
        'extern "C" void test_blocks(int problem, const float* from, int64_t blocks, float* values,'
        " float* quotients, uint8_t* codes, uint8_t* finite) {\n"
        f"switch (problem) {{\n{cases}}}\n}}\n"
    )
    path = Path(tmp_path_factory.mktemp("blocks")) / "blocks.cpp"
    path.write_text("\n".join(parts), encoding="utf-8")
    built = path.with_suffix(".so")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi",
             "-Wno-unknown-pragmas"]  # fmt: skip
    subprocess.run(["g++", *flags, str(path), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def run(library: ctypes.CDLL, problem: QuantizeProblem, x: Tensor) -> tuple[Tensor, ...]:
    """Return the values that are quantized, quotients, codes of scales, and which are finite."""
    blocks = x.numel() // BLOCK
    values, quotients = torch.empty_like(x), torch.empty_like(x)
    codes, finite = (torch.empty(blocks, dtype=torch.uint8) for _ in range(2))
    parts = (values, quotients, codes, finite)
    pointers = (ctypes.c_void_p(part.data_ptr()) for part in parts)
    library.test_blocks(
        ALL.index(problem), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(blocks), *pointers
    )
    return parts


def hard_blocks(element: str) -> Tensor:
    """Return blocks of all sizes, with values in the middle between others, and with zeros."""
    spec, generator = FORMATS[element], torch.Generator().manual_seed(0)
    normal = torch.randn(20000, BLOCK, generator=generator)
    spread = torch.exp2(torch.randint(-130, 120, (20000, 1), generator=generator).float())
    numbers = torch.tensor(sorted({abs(v) for v in spec.values if v == v and abs(v) <= spec.max}))
    middles = (numbers[1:] + numbers[:-1]) / 2
    picks = torch.cat([numbers, middles])
    grid = picks[torch.randint(len(picks), (20000, BLOCK), generator=generator)]
    signs = torch.randint(2, grid.shape, generator=generator) * 2 - 1.0
    powers = torch.exp2(torch.randint(-120, 100, (20000, 1), generator=generator).float())
    # Twice the same sizes with other signs: gains that cancel or nearly do.
    mirrored = torch.cat([grid[:, :16], -grid[:, :16]], 1) * powers
    special = torch.zeros(4, BLOCK)
    special[1] = -0.0
    special[2, 5], special[3] = 1e-40, torch.finfo(torch.bfloat16).max
    return torch.cat([normal * spread, grid * signs * powers, mirrored, special])


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_scales_and_codes_are_those_of_numerics(library, problem: QuantizeProblem) -> None:
    operand = problem.operand
    x = hard_blocks(operand.format.name).bfloat16().float()
    values, quotients, codes, finite = run(library, problem, x)
    expected, (scales,) = quantize(x, operand)
    assert torch.equal(values, x)
    assert bool((finite == 1).all())
    assert torch.equal(codes, scales[:, 0])
    assert torch.equal(encode(quotients, operand.format), expected)


@pytest.mark.parametrize("problem", PRODUCED, ids=str)
def test_outputs_are_rounded_before_and_behind_their_activation(
    library, problem: QuantizeProblem
) -> None:
    type = TYPES[problem.input]
    x = torch.randn(4000, BLOCK, generator=torch.Generator().manual_seed(1)) * 3
    values, quotients, codes, _ = run(library, problem, x)
    plain = x.to(type)
    expected = fused.activate(plain, problem.producer)
    assert torch.equal(values, values.to(type).float())
    distance = (values - expected.float()).abs()
    assert bool((distance <= 6 * torch.finfo(type).eps * plain.float().abs()).all())
    if not problem.producer:
        assert torch.equal(values, plain.float())
    wanted, (scales,) = quantize(values, problem.operand)
    assert torch.equal(codes, scales[:, 0])
    assert torch.equal(encode(quotients, problem.operand.format), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_noticed(library, value: float) -> None:
    for place in range(BLOCK):
        x = torch.ones(2, BLOCK)
        x[1, place] = value
        assert run(library, PROBLEMS[0], x)[3].tolist() == [1, 0]
