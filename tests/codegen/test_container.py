"""Containers hold values exactly."""

import math

import pytest

from fpcompiler.codegen.container import NATIVE, Container, exact_container
from fpcompiler.formats import FORMATS
from fpcompiler.target import TARGETS

SIGNED = [spec for spec in FORMATS.values() if spec.signed]


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("source", SIGNED, ids=lambda spec: spec.name)
def test_every_code_keeps_its_value(kind, source) -> None:
    container = exact_container(source, NATIVE[kind])
    if container is None:
        return
    element = FORMATS[container.element]
    assert len(container.codes) == source.code_count
    for code, stored in enumerate(container.codes):
        value = source.value(code)
        if math.isfinite(value):
            assert element.value(stored) == math.ldexp(value, container.shift)
            assert math.copysign(1, element.value(stored)) == math.copysign(1, value)


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.name.startswith("sm_")])
def test_there_is_a_container_for_exactly_what_the_targets_list(target) -> None:
    kinds = [kind for kind in target.kinds if kind.name in NATIVE]
    assert kinds
    for kind in kinds:
        found = {s.name for s in SIGNED if exact_container(s, NATIVE[kind.name]) is not None}
        listed = {*kind.weights, *kind.activations}
        # Kinds of two FP4 operands list E2M1 alone; what it holds besides is nothing.
        assert found == listed


def test_native_formats_keep_their_codes() -> None:
    for names in NATIVE.values():
        for name in names:
            assert exact_container(FORMATS[name], names) == Container(name, name)


@pytest.mark.parametrize(
    ("source", "element", "shift"),
    [
        ("f4E1M2FN", "f6E3M2FN", 0),
        ("f4E3M0FN", "f6E3M2FN", 0),
        ("f6E4M1FN", "f8E4M3FN", 0),
        ("f6E5M0FN", "f8E5M2", -1),  # its largest number is 2**16, that of E5M2 57,344
    ],
)
def test_the_narrowest_container_is_taken(source, element, shift) -> None:
    found = exact_container(FORMATS[source], NATIVE["mxf8f6f4"])
    assert found == Container(source, element, shift)


def test_a_format_with_more_mantissa_than_any_container_has_none() -> None:
    assert exact_container(FORMATS["f8E3M4FN"], NATIVE["mxf8f6f4"]) is None


def test_codes_that_are_no_number_stay_none() -> None:
    for name in ("f8E4M3FN", "f8E5M2"):
        codes, spec = Container(name, name).codes, FORMATS[name]
        lost = [code for code in range(256) if not math.isfinite(spec.value(code))]
        assert lost
        assert all(math.isnan(spec.value(codes[code])) for code in lost)
