"""Instances of packed weights: which layers have one, and which descriptions are one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from fpcompiler.codegen.hopper import PackedGemm, describe, packed_gemm, parse_instance
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType
from fpcompiler.errors import ArtifactError
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.scheme.presets import PRESETS

MX, NV, PLAIN = BlockScale.MX32, BlockScale.NV16, BlockScale.NONE
CHOICES = {
    "w4a16": (Mode.BF16, MX),
    "w4a8": (Mode.BF16, MX),
    "w4a6": (Mode.BF16, MX),
    "w4a4": (Mode.BF16, MX),
    "w4a8-row": (Mode.E4M3, PLAIN),
    "w4a6-row": (Mode.INTEGERS, PLAIN),
    "w4a4-row": (Mode.INTEGERS, PLAIN),
    "nvfp4": (Mode.BF16, NV),
    "mxfp4": (Mode.BF16, MX),
    "mxfp6": None,  # weights of six and eight bits
    "mxfp8": None,
    "w_mxfp4_a_mxfp6_e2m3": (Mode.BF16, MX),
    "w_mxfp4_a_mxfp6_e3m2": (Mode.BF16, MX),
    "fp4dit": None,  # a real scale for each block
    "fp4dit-w4a8": None,
    "fp4dit-sigma": None,
    "fp4dit-sigma-w4a8": None,
}
E2M1_ROW, E2M1_MX = "f4E2M1FN@row:f32", "f4E2M1FN@row:f32/block32:f8E8M0FNU"
INSTANCES = [
    PackedGemm("sm_90a", Mode.INTEGERS, "f4E2M1FN", PLAIN, OutputType.BF16, Activation.NONE),
    PackedGemm("sm_90a", Mode.INTEGERS, "f4E1M2FN", PLAIN, OutputType.F32, Activation.SILU),
    PackedGemm("sm_90a", Mode.E4M3, "f4E2M1FN", PLAIN, OutputType.F16, Activation.GELU),
    PackedGemm("sm_90a", Mode.BF16, "f4E2M1FN", PLAIN, OutputType.BF16, Activation.GELU_TANH),
    PackedGemm("sm_90a", Mode.BF16, "f4E2M1FN", MX, OutputType.BF16, Activation.NONE),
    PackedGemm("sm_90a", Mode.BF16, "f4E2M1FN", NV, OutputType.BF16, Activation.NONE),
]


def chosen(
    weight: str,
    activation: str,
    arch: str = "sm_90a",
    output: OutputType = OutputType.BF16,
    function: Activation = Activation.NONE,
) -> PackedGemm | None:
    """Return what :func:`packed_gemm` returns for texts; the activation ``none`` is plain bf16."""
    operand = None if activation == "none" else Operand.parse(activation)
    return packed_gemm(Operand.parse(weight), operand, arch, output, function)


def test_every_preset_has_a_known_choice() -> None:
    found = {name: chosen(preset.weight, preset.activation) for name, preset in PRESETS.items()}
    assert {name: g and (g.mode, g.scale) for name, g in found.items()} == CHOICES


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100a", "sm_120a"])
def test_they_are_for_hopper_only(arch: str) -> None:
    assert not any(chosen(p.weight, p.activation, arch) for p in PRESETS.values())


@pytest.mark.parametrize(
    ("weight", "activation", "mode"),
    [
        ("f4E1M2FN@row:f32", "f6E2M3FN@token:f32", Mode.INTEGERS),
        ("f4E2M1FN@tensor:f32", "f6E2M3FN@token:f32", Mode.INTEGERS),
        (E2M1_ROW, "f6E2M3FN@tensor:f32", Mode.E4M3),  # sums stand behind scales of tokens
        (E2M1_ROW, "f6E3M2FN@token:f32", Mode.E4M3),  # integers up to 448
        ("f4E1M2FN@row:f32", "f6E3M2FN@token:f32", None),  # E1M2 is in integers only
        ("f4E3M0FN@row:f32", "f6E2M3FN@token:f32", None),  # integers up to 64
        (E2M1_MX, "f6E2M3FN@token:f32", Mode.BF16),
        (E2M1_ROW, "f6E2M3FN@block32:f8E8M0FNU", Mode.BF16),
        (E2M1_ROW, "f6E2M3FN@block128:f32", None),  # products with real scales
        (E2M1_ROW, "none", Mode.BF16),
        ("f4E1M2FN@row:f32", "none", None),
        ("f4E2M1FN@block16:f8E8M0FNU", "none", None),  # no such scales of 16
    ],
)
def test_modes_hold_the_operands(weight: str, activation: str, mode: Mode | None) -> None:
    found = chosen(weight, activation)
    assert (found and found.mode) == mode


def test_functions_and_outputs_without_a_kernel() -> None:
    assert chosen(E2M1_ROW, "f6E2M3FN@token:f32", function=Activation.RELU) is None
    assert chosen(E2M1_ROW, "f6E2M3FN@token:f32", output=OutputType.F32) is not None
    assert chosen(E2M1_MX, "none", output=OutputType.F16) is None  # X is bf16, and so is D


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: instance.name)
def test_a_description_is_json_and_says_all(instance: PackedGemm) -> None:
    assert parse_instance(json.loads(json.dumps(describe(instance)))) == instance


def test_names_differ() -> None:
    functions = [each for each in Activation if each is not Activation.RELU]
    pairs = itertools.product(OutputType, functions)
    every = [
        PackedGemm(i.arch, i.mode, i.b, i.scale, output, function)
        for output, function in pairs
        for i in INSTANCES
    ]
    assert len({instance.name for instance in every}) == len(every)


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "sm_100a"},
        {"arch": 'sm_90a"; rm'},
        {"arch": ["sm_90a"]},
        {"mode": "e4m3"},  # but activations are bytes
        {"mode": "e4m3", "a": "f8E4M3FN", "b": "f4E1M2FN"},
        {"mode": "bf16", "a": "bf16", "b": "f4E1M2FN"},
        {"mode": "e4m3", "a": "f8E4M3FN", "scale": "block32:f8E8M0FNU"},
        {"mode": "i9"},
        {"mode": None},
        {"a": "bf16"},
        {"b": "f6E2M3FN"},  # six bits
        {"b": "f4E3M0FN"},  # integers up to 64
        {"b": "f4E2M1FN\n#include </etc/passwd>"},
        {"b": ["f4E2M1FN"]},
        {"scale": "block32:f8E8M0FNU"},  # integers have no blocks
        {"scale": "block64:f8E8M0FNU"},
        {"output": 'bf16)json"; }'},
        {"output": "f64"},
        {"activation": "relu"},
        {"activation": "fpc::kIdentity; }; struct More {"},
        {"residual": True},
        {"residual": 0},
        {"more": 1},
        {"tile": {"m": 64}},
    ],
)
def test_descriptions_that_are_none_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="describes no kernel of this version"):
        parse_instance({**describe(INSTANCES[0]), **change})


@pytest.mark.parametrize("missing", sorted(describe(INSTANCES[0])))
def test_descriptions_with_a_part_missing_are_refused(missing: str) -> None:
    values = {name: value for name, value in describe(INSTANCES[0]).items() if name != missing}
    with pytest.raises(ArtifactError, match="describes no kernel of this version"):
        parse_instance(values)


@pytest.mark.parametrize("values", [None, [], "i8", 1, {}])
def test_other_values_are_refused(values: object) -> None:
    with pytest.raises(ArtifactError, match="describes no kernel of this version"):
        parse_instance(values)
