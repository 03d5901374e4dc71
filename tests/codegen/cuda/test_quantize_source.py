"""The sources of quantizers, and what compilers make of them for each architecture."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from fpcompiler.codegen.cuda import quantize_source
from fpcompiler.errors import FormatError, TargetError
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda import QuantizeProblem
from tests.codegen.cuda.problems import build_library

NVFP4 = Operand.parse("e2m1@tensor:f32/block16:e4m3")
MX6 = Operand.parse("e2m3@block32:e8m0")
TOKEN = Operand.parse("e3m2@token:f32")
E4M3 = "f8E4M3FN"
FP6 = Operand.parse("e2m3@token:f32")
FP8 = Operand.parse("e4m3@token:f32")

TYPICAL = (
    QuantizeProblem(NVFP4, swizzled=True, given=True),
    QuantizeProblem(MX6, producer="rms_norm", beside=("bf16", "", "", ""), swizzled=True),
    QuantizeProblem(TOKEN, producer="silu_mul", beside=("", "", "bf16", "")),
    QuantizeProblem(FP8, producer="layer_norm_modulate", beside=("", "", "bf16", "bf16")),
    QuantizeProblem(FP6, producer="gelu_tanh", stored="i8"),
    QuantizeProblem(MX6, stored="bf16"),
)
CONVERSIONS = {"e4m3x2": 89, "e2m1x2": 100, "e2m3x2": 100, "e3m2x2": 100}


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_kernels_compile_without_spills_and_convert_by_ptx(arch: str, tmp_path) -> None:
    source = quantize_source(TYPICAL, arch)
    file = tmp_path / "quantize.cu"
    file.write_text(source.text)
    report = build_library(file, (*source.flags, "--keep", f"--keep-dir={tmp_path}"), arch)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    # One kernel for each problem, and where rows are reduced others for long rows: one for norms. A
    # few long rows have clusters, where scales are not swizzled, and many look up activations.
    assert len(stacks) == 2 + 2 * 2 + 2 * 3 + 3 + 2
    assert set(stacks) == {("0", "0")}
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    number = int(re.findall(r"\d+", arch)[0])
    for name, first in CONVERSIONS.items():
        assert (f"cvt.rn.satfinite.{name}.f32" in ptx) == (number >= first), name
    assert not re.search(r"\.ftz|\bdiv\.(approx|full)|(sqrt|rcp)\.approx", ptx)
    kernels = ptx.split(".entry ")[1:]
    assert len(kernels) == len(stacks)
    for kernel in kernels:
        first = re.search(r"\b(ld|st|red|atom)\.(?!param|shared)", kernel)
        wait, start = (kernel.index(f"griddepcontrol.{s};") for s in ("wait", "launch_dependents"))
        assert first
        assert start < wait < first.start(), "an earlier kernel may not be through"
    assert ".nc." not in ptx, "the cache for constants would not see what an earlier kernel writes"
    assert _machine_code_is_for(arch, file.with_suffix(".so"))


def test_kernels_before_hopper_begin_when_others_end() -> None:
    assert "#define FPC_FOLLOWS 0\n" in quantize_source(TYPICAL[:1], "sm_89").text
    assert "#define FPC_FOLLOWS 1\n" in quantize_source(TYPICAL[:1], "sm_90a", software=True).text


def _machine_code_is_for(arch: str, library) -> bool:
    tool = shutil.which("cuobjdump")
    if tool is None:  # ptxas printed its report, so there is machine code
        return True
    run = subprocess.run([tool, "-lelf", str(library)], capture_output=True, text=True, check=True)
    return f"{arch}.cubin" in run.stdout


def test_a_source_says_what_it_is_for() -> None:
    text = quantize_source(TYPICAL, "sm_100a").text
    for problem in TYPICAL:
        assert f"// {problem}\n" in text
    assert "kConvert = kConvertE2M3" in text
    assert "kConvert = kSoftware" not in text
    assert '#include "' not in text


def test_without_conversions_codes_are_made_by_software() -> None:
    for text in (
        quantize_source(TYPICAL, "sm_100a", software=True).text,
        quantize_source(TYPICAL[:3], "sm_90a").text,
        quantize_source(TYPICAL[:3], "sm_100").text,  # FP4 is a feature of "a" and "f" alone
    ):
        own = text[text.index("struct Problem0") :]
        assert "kConvertE" not in own


@pytest.mark.parametrize("arch", ["sm_80", "sm90", "100a", ""])
def test_other_architectures_are_refused(arch: str) -> None:
    with pytest.raises(TargetError, match="sm_89 or later"):
        quantize_source(TYPICAL, arch)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"operand": FP8, "stored": E4M3}, "in other bits than its own"),
        ({"operand": Operand.parse("f6E1M4FN@token:f32"), "stored": E4M3}, "every number"),
        ({"operand": TOKEN, "stored": "f8E5M2"}, "there is no form 'f8E5M2'"),
        ({"operand": TOKEN, "stored": "i8"}, "integers up to 448, and no int8"),
        ({"operand": Operand.parse("e2m3@tensor:f32"), "stored": "i8"}, "one scale per token"),
        ({"operand": MX6, "stored": "i8"}, "one scale per token, without blocks"),
        ({"operand": Operand.parse("e2m3@block32:f32"), "stored": "bf16"}, "real scales"),
        ({"operand": Operand.parse("e1m4@block16:e4m3"), "stored": "bf16"}, "does not hold every"),
        ({"operand": MX6, "stored": "bf16", "swizzled": True}, "can be swizzled"),
        ({"operand": TOKEN, "swizzled": True}, "can be swizzled"),
        ({"operand": TOKEN, "given": True}, "only the scale of a tensor"),
        ({"operand": TOKEN, "hadamard": 48}, "Hadamard blocks are 16, 32, 64, 128"),
        ({"operand": TOKEN, "input": "f64"}, "tensors are f32, f16, bf16"),
        ({"operand": TOKEN, "producer": "silu_mul"}, "silu_mul needs a scale"),
        ({"operand": TOKEN, "producer": "softmax"}, "there is no producer 'softmax'"),
        ({"operand": TOKEN, "beside": ("f32", "", "", "")}, "nothing but x is read"),
    ],
)
def test_impossible_problems_are_refused(options, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        QuantizeProblem(**options)


def test_texts_of_problems_differ() -> None:
    from tests.codegen.cuda import problems

    found = [
        *problems.formats(), *problems.all_scales(("f4E2M1FN",), ("bf16",)), *problems.special(),
        *problems.produced(("bf16", "f32")), *problems.mixed(), *problems.rotated(),
        *problems.stored(), *problems.stored_of_producers(),
    ]  # fmt: skip
    unique = list(dict.fromkeys(found))
    assert len({str(problem) for problem in unique}) == len(unique)
