"""Sources of kernels of packed weights: whole, the same each time, and with the right tables."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest
import torch

from fpcompiler.codegen.hopper import PackedGemm, describe, emit, parse_instance
from fpcompiler.codegen.hopper.emit import HEADERS
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.stored import integer_shift

BF16, NONE = OutputType.BF16, Activation.NONE
INSTANCES = [
    PackedGemm("sm_90a", Mode.INTEGERS, "f4E2M1FN", BlockScale.NONE, BF16, NONE),
    PackedGemm("sm_90a", Mode.INTEGERS, "f4E1M2FN", BlockScale.NONE, BF16, NONE),
    PackedGemm("sm_90a", Mode.INTEGERS, "f4E2M1FN", BlockScale.NONE, OutputType.F32, NONE),
    PackedGemm("sm_90a", Mode.INTEGERS, "f4E2M1FN", BlockScale.NONE, BF16, Activation.GELU_TANH),
    PackedGemm("sm_90a", Mode.E4M3, "f4E2M1FN", BlockScale.NONE, BF16, NONE),
    PackedGemm("sm_90a", Mode.BF16, "f4E2M1FN", BlockScale.NONE, BF16, NONE),
    PackedGemm("sm_90a", Mode.BF16, "f4E2M1FN", BlockScale.MX32, BF16, NONE),
    PackedGemm("sm_90a", Mode.BF16, "f4E2M1FN", BlockScale.NV16, BF16, NONE),
]
TEXTS = {instance: emit(instance).text for instance in INSTANCES}
every_instance = pytest.mark.parametrize("instance", INSTANCES, ids=lambda each: each.name)


def test_every_header_is_in_the_source_once() -> None:
    root = resources.files("fpcompiler.codegen")
    folder = dict(HEADERS)["hopper"]
    there = {file.name for file in (root / "hopper").iterdir() if file.name.endswith(".h")}
    assert set(folder) == there
    assert len(folder) == len(there)
    text = TEXTS[INSTANCES[0]]
    for name in folder:
        assert text.count((root / "hopper" / name).read_text(encoding="utf-8")) == 1


@every_instance
def test_the_source_is_the_same_each_time(instance: PackedGemm) -> None:
    again = parse_instance(json.loads(json.dumps(describe(instance))))
    assert emit(again) == emit(instance)
    assert emit(again).text == TEXTS[instance]


def test_every_instance_has_a_source_of_its_own() -> None:
    assert len(set(TEXTS.values())) == len(INSTANCES)


@every_instance
def test_nothing_is_missing_in_the_source(instance: PackedGemm) -> None:
    text = TEXTS[instance]
    assert set(re.findall(r"#include (\S)", text)) == {"<"}  # headers of the toolchain only
    assert "#pragma once" not in text
    assert text.isascii()
    # Macros and error codes of ours, without the beginnings of names that a macro completes.
    used = {name for name in re.findall(r"\bFPC_\w+", text) if not name.endswith("_")}
    defined = set(re.findall(r"#define (FPC_\w+)", text)) | set(re.findall(r"(FPC_\w+) = ", text))
    assert used <= defined
    assert text.count("struct Problem {") == text.count("FPC_LIBRARY(Problem)") == 1
    assert f"// {instance.name}\n" in text


@every_instance
def test_the_problem_is_that_of_the_instance(instance: PackedGemm) -> None:
    modes = {Mode.INTEGERS: "kInt8", Mode.E4M3: "kE4m3", Mode.BF16: "kFloats"}
    assert constant(instance, "kMode") == f"fpc::{modes[instance.mode]}"
    assert constant(instance, "kBlock") == str(instance.scale.block)
    outputs = {OutputType.BF16: "kBf16", OutputType.F32: "kF32"}
    assert constant(instance, "kOutput") == f"fpc::{outputs[instance.output]}"
    functions = {Activation.NONE: "kIdentity", Activation.GELU_TANH: "kActGeluTanh"}
    assert constant(instance, "kActivation") == f"fpc::{functions[instance.activation]}"


@every_instance
def test_tables_hold_the_numbers_of_the_format(instance: PackedGemm) -> None:
    table = int(constant(instance, "kMagnitudes").removesuffix("ull"), 16)
    row = list(table.to_bytes(8, "little"))
    spec = FORMATS[instance.b]
    if instance.mode is Mode.BF16:  # kernels compute them
        assert table == 0
    elif instance.mode is Mode.INTEGERS:
        assert [byte * 2.0 ** -integer_shift(spec) for byte in row] == list(spec.values[:8])
    else:
        values = decode(torch.tensor(row, dtype=torch.uint8), FORMATS["f8E4M3FN"])
        assert values.tolist() == list(spec.values[:8])


@every_instance
def test_the_description_stands_in_the_source(instance: PackedGemm) -> None:
    found = re.findall(r'R"json\((.*)\)json"', TEXTS[instance])
    assert [json.loads(text) for text in found] == [describe(instance)]
    assert emit(instance).description == describe(instance)


def constant(instance: PackedGemm, name: str) -> str:
    """Return the text of a constant of the problem."""
    problem = TEXTS[instance].partition("struct Problem {")[2]
    found = re.search(rf"static constexpr \S+ {name} = (.*);", problem)
    assert found is not None
    return found[1]
