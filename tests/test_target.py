"""Targets: lookups, what the rows claim about formats, and honest answers."""

import itertools
import math

import pytest

from fpcompiler.errors import TargetError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.operand import Operand
from fpcompiler.scheme import PRESETS, Scheme
from fpcompiler.target import TARGETS, Status, lookup

W4, A6 = Operand.parse("e2m1@row:f32/block32:e8m0"), Operand.parse("e2m3@block32:e8m0")
NV = Operand.parse("e2m1@tensor:f32/block16:e4m3")


def test_lookup_lists_the_choices() -> None:
    assert lookup("reference").available
    with pytest.raises(TargetError, match=r"Did you mean sm_90a.*reference, cpu, sm_90a, sm_100a"):
        lookup("sm_90")


@pytest.mark.parametrize("name", PRESETS)
def test_the_reference_runs_every_scheme(name: str) -> None:
    layer = Scheme.parse(name).base
    assert layer.weight is not None
    assert lookup("reference").supports(layer.weight, layer.activation) is None


def test_plans_are_for_processors_and_kernels_of_gpus_stand_beside_them() -> None:
    for target in TARGETS.values():
        if target.beside:
            ran = target.name == "sm_90a"
            assert target.status is (Status.EXECUTED if ran else Status.COMPILED_ONLY)
            assert not target.available
            assert target.supports(W4, A6) == (
                f"{target.name}: its kernels stand beside a plan for the target cpu or reference"
            )
    assert [target.name for target in TARGETS.values() if target.available] == ["reference", "cpu"]


@pytest.mark.parametrize(
    ("target", "weight", "activation", "kind"),
    [
        ("sm_100a", W4, A6, "mxf8f6f4"),
        ("sm_100a", W4, Operand.parse("e2m1@block32:e8m0"), "mxf4"),
        ("sm_100a", NV, NV, "nvf4"),
        ("sm_100a", W4, None, "bf16"),
        ("sm_100a", Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32"), "f8f6f4"),
        ("sm_120a", W4, A6, "mxf8f6f4"),
        ("sm_120a", Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32"), "f8f6f4"),
        ("sm_90a", W4, A6, "bf16"),
        ("sm_90a", Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32"), "int8"),
        ("sm_90a", Operand.parse("e2m1@row:f32"), Operand.parse("e4m3@token:f32"), "fp8"),
        ("sm_90a", NV, None, "bf16"),
        # FP8 holds these two, and no others of LLM-FP4 at 6 and 8 bits.
        ("sm_100a", W4, Operand.parse("e4m1@block32:e8m0"), "mxf8f6f4"),
        ("sm_90a", Operand.parse("e2m1@row:f32"), Operand.parse("e5m0@token:f32"), "fp8"),
        ("sm_100a", W4, Operand.parse("e1m4@block32:e8m0"), "bf16"),
        ("sm_90a", Operand.parse("e1m6@row:f32"), Operand.parse("e1m6@token:f32"), "bf16"),
        ("sm_90a", Operand.parse("e2m5@row:f32"), Operand.parse("e2m5@token:f32"), "bf16"),
        ("reference", Operand.parse("e5m0@block16:e4m3"), Operand.parse("e1m6@row:f32"), "decode"),
        ("cpu", W4, A6, "int8"),
        ("cpu", W4, Operand.parse("e4m3@block32:e8m0"), "bf16"),
        ("cpu", NV, None, "bf16"),
        ("cpu", Operand.parse("e2m3@row:f32"), A6, "int8"),
        ("cpu", Operand.parse("e3m2@row:f32"), A6, "bf16"),
    ],
)
def test_the_hardware_instruction_of_a_pair(target, weight, activation, kind) -> None:
    found = lookup(target).kind_for(weight, activation)
    assert found is not None
    assert found.name == kind


def test_pairs_that_no_instruction_takes() -> None:
    real_blocks = Operand.parse("e2m1@block128:f32")
    assert lookup("sm_100a").kind_for(real_blocks, A6) is None
    assert lookup("sm_90a").kind_for(real_blocks, None) is None
    assert lookup("sm_90a").kind_for(NV, Operand.parse("e3m4")) is None


def embeds(spec: FloatSpec, container: FloatSpec) -> bool:
    """Whether one power of two maps every value of a format to one of the container."""
    values = {abs(v) for v in spec.values if math.isfinite(v)}
    room = {abs(v) for v in container.values if math.isfinite(v)}
    return any({math.ldexp(v, shift) for v in values} <= room for shift in range(-30, 31))


def test_fp8_containers_hold_exactly_what_the_rows_claim() -> None:
    kinds = [
        k for t in TARGETS.values() for k in t.kinds if k.name in ("fp8", "f8f6f4", "mxf8f6f4")
    ]
    containers = [FORMATS["f8E4M3FN"], FORMATS["f8E5M2"]]
    fits = {
        name
        for name, spec in FORMATS.items()
        if spec.signed and any(embeds(spec, container) for container in containers)
    }
    assert len(kinds) == 5
    for kind in kinds:
        assert set(kind.weights) == set(kind.activations) == fits


def test_int8_holds_the_products_of_the_cpu_row() -> None:
    kind = lookup("cpu").kinds[0]
    for name in {*kind.weights, *kind.activations}:
        spec = FORMATS[name]
        assert all((v / spec.smallest).is_integer() for v in spec.values)
        assert spec.max / spec.smallest <= 127
    excluded = [s for s in FORMATS.values() if s.signed and s.max / s.smallest > 127]
    assert not {s.name for s in excluded} & {*kind.weights, *kind.activations}


def test_bf16_holds_every_format() -> None:
    for spec, code in itertools.product(FORMATS.values(), range(256)):
        value = spec.value(code) if code < spec.code_count else 0.0
        if math.isfinite(value):
            assert (math.frexp(value)[0] * 256).is_integer()
