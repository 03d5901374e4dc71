"""The CUDA C++ of kernels that quantize activations.

A source holds the headers beside this file and, for each problem, a structure with what is known of
it. It needs no other header, no library but the CUDA runtime, and no flags for its results: only
``-ftz=true`` (also of ``-use_fast_math``) would change them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fpcompiler.errors import TargetError
from fpcompiler.operand import Granularity, ScaleRounding
from fpcompiler.runtime.cuda import QuantizeProblem
from fpcompiler.runtime.cuda.stored import STORED
from fpcompiler.runtime.fused import HEADS, PRODUCERS, TAILS

__all__ = ["quantize_source", "QuantizeSource", "problem_text", "structure_text", "HEADERS"]

HEADERS: Final = (
    "arguments.h", "instructions.h", "types.h", "formats.h", "scales.h", "functions.h",
    "activations.h", "produce.h", "rows.h", "encode.h", "kernels.h",
)  # fmt: skip
"""The headers of a source, each after those it needs."""

_TYPES: Final = {"": "kNoType", "f32": "kF32", "f16": "kF16", "bf16": "kBf16"}
_HEADS: Final = dict(
    zip(
        HEADS,
        ("kRmsNorm", "kRmsNormWide", "kLayerNorm", "kSilu", "kGelu", "kGeluTanh", "kRelu"),
        strict=True,
    )
)
_TAILS: Final = dict(zip(TAILS, ("kNoTail", "kMul", "kAdd", "kModulate"), strict=True))
_BLOCK_SCALES: Final = {"f32": "kRealScale", "f8E8M0FNU": "kE8M0Scale", "f8E4M3FN": "kE4M3Scale"}
_ROUNDINGS: Final = {
    ScaleRounding.FLOOR: "kFloor",
    ScaleRounding.CEIL: "kCeil",
    ScaleRounding.RNE: "kNearest",
    ScaleRounding.MSE: "kLeastError",
}
_STORED: Final = dict(zip(STORED, ("kPacked", "kE4M3Bytes", "kIntegers", "kProducts"), strict=True))

_HOPPER: Final = 90
"""The first architecture on which a kernel can begin before the last one ends."""

_CONVERTS: Final = {
    "f8E4M3FN": (1, "kConvertE4M3"),
    "f4E2M1FN": (2, "kConvertE2M1"),
    "f6E2M3FN": (2, "kConvertE2M3"),
    "f6E3M2FN": (2, "kConvertE3M2"),
}
"""Formats that PTX converts to, and the level of instructions that has it."""


@dataclass(frozen=True)
class QuantizeSource:
    """What nvcc compiles to one library.

    The library exports ``fpc_quantize_rows(problem, arguments, stream)`` and
    ``fpc_quantize_problem(problem)``, the text of one; the structures are in ``arguments.h``.
    ``fpc_cuda_error_text(error)`` says what a ``cudaError_t`` is.

    Attributes:
        text: The source.
        flags: What nvcc must be told, beside the architecture and how to make a library.
    """

    text: str
    flags: tuple[str, ...] = ("-std=c++17",)


def quantize_source(
    problems: Sequence[QuantizeProblem], arch: str, *, software: bool = False
) -> QuantizeSource:
    """Return the kernels of some problems, in their order.

    Args:
        problems: What they compute.
        arch: What nvcc calls the GPU, such as ``sm_90a`` or ``sm_100f``.
        software: Whether codes are made without conversions of PTX, for comparisons.

    Raises:
        TargetError: If ``arch`` is no architecture of 8.9 or later.
    """
    number, level = _level(arch)
    level = 0 if software else level
    folder = Path(__file__).parent
    parts = [f"#define FPC_CONVERTS {level}\n#define FPC_FOLLOWS {int(number >= _HOPPER)}\n"]
    parts += [(folder / name).read_text(encoding="utf-8") for name in HEADERS]
    parts.append(problem_text(problems, level))
    return QuantizeSource("\n".join(parts))


def problem_text(problems: Sequence[QuantizeProblem], level: int) -> str:
    """Return what follows the headers: problems as structures, and the functions of the library.

    Args:
        problems: What the kernels compute.
        level: 0 without conversions of PTX, 1 with those of Hopper, 2 with those of Blackwell.
    """
    structures = "\n".join(structure_text(i, problem, level) for i, problem in enumerate(problems))
    cases = "".join(
        f"        case {i}: return fpc::quantize<fpc::Problem{i}>(*arguments, stream);\n"
        for i in range(len(problems))
    )
    names = "".join(f'        case {i}: return "{p}";\n' for i, p in enumerate(problems))
    return f"""namespace fpc {{

{structures}
}}  // namespace fpc

#pragma GCC visibility push(default)
extern "C" int32_t fpc_quantize_rows(int32_t problem, const FpcQuantizeArguments* arguments,
                                     void* stream) {{
    switch (problem) {{
{cases}        default: return FPC_REFUSED;
    }}
}}

extern "C" const char* fpc_quantize_problem(int32_t problem) {{
    switch (problem) {{
{names}        default: return nullptr;
    }}
}}
extern "C" const char* fpc_cuda_error_text(int32_t error) {{ return fpc::error_text(error); }}
#pragma GCC visibility pop
"""


def _level(arch: str) -> tuple[int, int]:
    """Return the number of an architecture, and its level of conversions."""
    match = re.fullmatch(r"sm_(\d+)([af]?)", arch)
    number, suffix = (int(match[1]), match[2]) if match else (0, "")
    if number < 89:
        raise TargetError(
            f"{arch!r} is no architecture that quantizers are generated for; take sm_89 or later, "
            "such as sm_90a, sm_100a or sm_120f."
        )
    return number, 2 if number >= 100 and suffix else 1


def structure_text(index: int, problem: QuantizeProblem, level: int) -> str:
    """Return what is known of a problem as a structure of C++, ``Problem`` and a number.

    Args:
        index: The number.
        problem: What a kernel computes.
        level: As in :func:`problem_text`.
    """
    operand, spec = problem.operand, problem.operand.format
    block = operand.block
    producer = PRODUCERS[problem.producer] if problem.producer else None
    needed, convert = _CONVERTS.get(spec.name, (3, ""))
    weight, bias, scale, shift = (_TYPES[name] for name in problem.beside)
    rounding = _ROUNDINGS[block.rounding] if block and block.rounding else "kNearest"
    return f"""// {problem}
struct Problem{index} {{
    struct Element {{
        static constexpr int kMantissaBits = {spec.mantissa_bits};
        static constexpr int kMagnitudeBits = {spec.magnitude_bits};
        static constexpr int kMinExponent = {spec.min_exponent}, kMaxExponent = {spec.max_exponent};
        static constexpr int kStorageBits = {spec.storage_bits};
        static constexpr float kMax = {float(spec.max)!r}f;
        static constexpr Convert kConvert = {convert if level >= needed else "kSoftware"};
    }};
    static constexpr Type kInput = {_TYPES[problem.input]};
    static constexpr Outer kOuter = {_outer(problem)};
    static constexpr bool kGiven = {_bool(problem.given)}, kSwizzled = {_bool(problem.swizzled)};
    static constexpr int kBlock = {block.block if block else 0};
    static constexpr BlockScale kBlockScale = {
        _BLOCK_SCALES[block.format] if block else "kNoBlockScale"
    };
    static constexpr Rounding kRounding = {rounding};
    static constexpr Stored kStored = {_STORED[problem.stored]};
    static constexpr int kCodeBits = {problem.code_bits}, kHadamard = {problem.hadamard};
    static constexpr Head kHead = {_HEADS[producer.head] if producer else "kNoHead"};
    static constexpr Tail kTail = {_TAILS[producer.tail] if producer else "kNoTail"};
    static constexpr Type kWeight = {weight}, kBias = {bias};
    static constexpr Type kScale = {scale}, kShift = {shift};
}};
"""


def _outer(problem: QuantizeProblem) -> str:
    outer = problem.operand.outer
    if outer is None:
        return "kNoOuter"
    return "kPerTensor" if outer.granularity is Granularity.TENSOR else "kPerRow"


def _bool(value: bool) -> str:
    return "true" if value else "false"
