"""Which format holds another one for an instruction."""

import pytest

from fpcompiler.codegen.container import NATIVE, container_for
from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.target import TARGETS

SIGNED = [spec for spec in FORMATS.values() if spec.signed]


def _held(spec, kind: str) -> bool:
    try:
        container_for(spec, kind)
    except NumericsError:
        return False
    return True


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.name.startswith("sm_")])
def test_there_is_a_container_for_exactly_what_the_targets_list(target) -> None:
    kinds = [kind for kind in target.kinds if kind.name in NATIVE]
    assert kinds
    for kind in kinds:
        found = {spec.name for spec in SIGNED if _held(spec, kind.name)}
        # Kinds of two FP4 operands list E2M1 alone; what it holds besides is nothing.
        assert found == {*kind.weights, *kind.activations}


def test_native_formats_are_read_as_they_are() -> None:
    for kind, names in NATIVE.items():
        for name in names:
            found = container_for(FORMATS[name], kind)
            assert (found.source, found.format, found.factor) == (FORMATS[name], FORMATS[name], 1)


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
    found = container_for(FORMATS[source], "mxf8f6f4")
    assert (found.format.name, found.shift) == (element, shift)


def test_a_format_with_more_mantissa_than_any_container_has_none() -> None:
    with pytest.raises(NumericsError, match="holds f8E3M4FN"):
        container_for(FORMATS["f8E3M4FN"], "mxf8f6f4")
