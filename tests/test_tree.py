import json
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import ArtifactError, RunError
from fpcompiler.tree import (
    LEAF,
    MAX_DEPTH,
    NONE,
    Output,
    check_spec,
    flatten,
    leaf_count,
    leaf_paths,
    spec_of,
    unflatten,
)

KEYS = st.text("abcxyz", min_size=1, max_size=3)
LEAVES = st.integers(0, 9).map(lambda n: torch.full((2,), n))
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    LEAVES | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, LEAVES, max_size=3).map(Output)
    ),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        pairs = zip(a.values(), b.values(), strict=True)
        return type(a) is type(b) and list(a) == list(b) and all(same(x, y) for x, y in pairs)
    return type(a) is type(b) and a == b


@settings(deadline=None, max_examples=200)
@given(VALUES)
def test_flatten_and_unflatten_are_inverse_also_through_json(value):
    spec = json.loads(json.dumps(spec_of(value)))
    assert check_spec(spec, "it") == spec
    leaves = flatten(spec, value, "it")
    assert len(leaves) == leaf_count(spec) == len(leaf_paths(spec))
    assert same(value, unflatten(spec, leaves))


def test_output_is_read_by_attribute_name_position_and_slice():
    out = Output(logits=1, hidden=2)
    assert (out.logits, out["hidden"], out[1], out[-1], out[:1]) == (1, 2, 2, 2, (1,))
    assert out.to_tuple() == (1, 2)
    with pytest.raises(AttributeError, match="no entry 'loss'; it has logits, hidden"):
        out.loss  # noqa: B018
    with pytest.raises(KeyError):
        out["loss"]


class FakeModelOutput(OrderedDict):
    """Like Hugging Face's: a mapping that also has its entries as attributes."""


def test_a_model_output_becomes_an_output_without_its_empty_entries():
    x = torch.ones(1)
    spec = spec_of(FakeModelOutput(loss=None, logits=x))
    assert spec == {"t": "output", "k": ["logits"], "c": [LEAF]}
    assert flatten(spec, FakeModelOutput(logits=x, past=None), "it") == [x]
    assert isinstance(unflatten(spec, [x]), Output)


def test_plain_dictionaries_keep_their_empty_entries():
    assert spec_of(OrderedDict(a=None)) == {"t": "dict", "k": ["a"], "c": [NONE]}


def test_keys_may_come_in_any_order_and_lists_stand_for_tuples():
    a, b = torch.ones(1), torch.ones(2)
    spec = spec_of({"a": a, "b": (b,)})
    assert flatten(spec, {"b": [b], "a": a}, "it") == [a, b]


@dataclass
class Opaque:
    """Something that cannot cross the border of a compiled model."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, Opaque()), r"the value\[1\] is a Opaque; only tensors"),
        ({1: torch.ones(1)}, "has the key 1; keys must be texts"),
        ([float("nan")], r"the value\[0\] is nan; .* must be finite"),
    ],
)
def test_what_cannot_be_described_is_refused(value, message):
    with pytest.raises(RunError, match=message):
        spec_of(value)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("example", "value", "message"),
    [
        (X, None, r"argument 'a': expected a tensor, got None"),
        (X, [X], r"argument 'a': expected a tensor, got a list"),
        (None, X, r"expected None, .* got a tensor of shape \[2, 3\]"),
        ((X, X), (X,), r"expected 2 items, got 1"),
        ((X,), X, r"expected a tuple of 1, got a tensor of shape \[2, 3\]"),
        ({"k": X}, {"v": X}, r"expected the keys \['k'\]; missing: \['k'\], unknown: \['v'\]"),
        ({"k": (X,)}, {"k": (1,)}, r"argument 'a'\['k'\]\[0\]: expected a tensor, got 1"),
        ({"k": X}, X, r"expected a dict, got a tensor"),
        (1, 2, r"compiled for the value 1, got 2"),
        (1, True, r"compiled for the value 1, got True"),
        (False, 0, r"compiled for the value False, got 0"),
        (1, X, r"compiled for the value 1, got a tensor"),
    ],
)
def test_a_value_of_another_nesting_is_refused(example, value, message):
    with pytest.raises(RunError, match=message):
        flatten(spec_of(example), value, "argument 'a'")


def test_the_number_of_leaves_must_fit():
    with pytest.raises(RunError, match="expected 2 values, got 1"):
        unflatten(spec_of([X, X]), [X])


def test_paths_name_the_leaves_like_python_does():
    spec = spec_of(Output(logits=X, hidden=(X, {"k": X})))
    assert leaf_paths(spec) == ["logits", "hidden[0]", "hidden[1].k"]
    assert leaf_paths(spec_of([X]), "past") == ["past[0]"]
    assert leaf_paths(LEAF) == [""]


NESTED = {"t": "leaf"}
for _ in range(MAX_DEPTH + 2):
    NESTED = {"t": "list", "c": [NESTED]}


@pytest.mark.parametrize(
    "spec",
    [
        None,
        [],
        {},
        {"t": "set", "c": []},
        {"t": ["leaf"]},
        {"t": "leaf", "c": []},
        {"t": "list"},
        {"t": "list", "c": {}},
        {"t": "tuple", "c": [{"t": "what"}]},
        {"t": "dict", "k": ["a"], "c": []},
        {"t": "dict", "k": ["a", "a"], "c": [LEAF, LEAF]},
        {"t": "dict", "k": [1], "c": [LEAF]},
        {"t": "output", "k": "a", "c": [LEAF]},
        {"t": "const", "v": [1]},
        NESTED,
    ],
)
def test_a_malformed_spec_is_refused(spec):
    with pytest.raises(ArtifactError, match="outputs"):
        check_spec(spec, "outputs")
