"""The sources of kernels of packed weights, and what nvcc makes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.hopper import PackedGemm, emit
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.fragments import Mode

E2M1 = "f4E2M1FN"


def instance(
    mode: Mode, scale: BlockScale = BlockScale.NONE, activation: Activation = Activation.NONE
) -> PackedGemm:
    return PackedGemm("sm_90a", mode, E2M1, scale, OutputType.BF16, activation)


@pytest.mark.parametrize("mode", Mode)
def test_headers_ask_for_no_macro_that_a_source_does_not_define(mode: Mode) -> None:
    text = re.sub(r"//.*", "", emit(instance(mode)).text)
    defined = {*re.findall(r"#define (FPC_\w+)", text), *re.findall(r"\b(FPC_\w+) = \d", text)}
    used = {name for name in re.findall(r"\bFPC_[A-Z0-9_]+\b", text) if not name.endswith("_")}
    assert "FPC_LAUNCH" in used
    assert not used - defined


@pytest.mark.nvcc
@pytest.mark.parametrize(
    "packed",
    [
        instance(Mode.INTEGERS),
        instance(Mode.E4M3, activation=Activation.SILU),
        instance(Mode.BF16, BlockScale.MX32, Activation.GELU_TANH),
    ],
    ids=lambda packed: packed.name,
)
def test_kernels_compile_without_spills(packed: PackedGemm, tmp_path: Path) -> None:
    built = KernelCache.from_options(Options(cache=tmp_path)).build(emit(packed))
    resources = built.metadata["resources"]
    assert resources
    assert not [row for row in resources if row["stores"] or row["loads"]]
