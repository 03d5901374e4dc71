"""The nesting of a call's arguments and results, as plain data that fits into JSON.

A spec is one of::

    {"t": "leaf"}                                     a tensor (or a number computed by the model)
    {"t": "none"}                                     None
    {"t": "const", "v": true}                         a JSON scalar that is part of the program
    {"t": "tuple" | "list", "c": [spec, ...]}
    {"t": "dict", "k": ["a", ...], "c": [spec, ...]}
    {"t": "output", "k": ["logits", ...], "c": [...]} a result with named entries (Hugging Face)

It replaces :mod:`torch.utils._pytree` in everything that is stored, because a pytree spec names
Python classes, and a program must load without the classes of the model.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch

from fpcompiler.errors import ArtifactError, RunError

Spec: TypeAlias = Mapping[str, Any]
"""The JSON form described above."""

LEAF: Final[Spec] = {"t": "leaf"}
NONE: Final[Spec] = {"t": "none"}

MAX_DEPTH: Final = 32
"""How deep a spec may nest; a deeper one is not from this compiler."""

_PLAIN_DICTS: Final = (dict, OrderedDict, defaultdict)
_SCALARS: Final = (bool, int, float, str)


class Output(dict[str, Any]):
    """A result with named entries: read as ``out.logits``, ``out["logits"]`` or ``out[0]``.

    It stands in for the ``ModelOutput`` classes of Hugging Face. Entries that were None are left
    out, as they are there when the result is indexed by number.
    """

    def __getitem__(self, key: Any) -> Any:
        """Return an entry by name, by position, or a tuple of entries for a slice."""
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        """Return an entry by name."""
        if name in self:
            return super().__getitem__(name)
        raise AttributeError(f"this output has no entry {name!r}; it has {', '.join(self)}")

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the entries without their names."""
        return tuple(self.values())


def spec_of(value: object, where: str = "the value") -> Spec:
    """Return the spec of a nested value.

    Args:
        value: Tensors, None and JSON scalars in tuples, lists and dicts with text keys, or objects
            like Hugging Face's ``ModelOutput`` (a mapping that is not a plain dict).
        where: What the value is, for the error.

    Raises:
        RunError: If something in it is of another type.
    """
    if isinstance(value, torch.Tensor):
        return LEAF
    if value is None:
        return NONE
    if isinstance(value, _SCALARS):
        return _const(value, where)
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {"t": kind, "c": [spec_of(v, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, Mapping):
        return _mapping_spec(value, where)
    raise RunError(
        f"{where} is a {type(value).__name__}; only tensors, None, numbers, texts, and tuples, "
        "lists and dicts of them can pass in or out of a compiled model. Convert it first."
    )


def _const(value: bool | int | float | str, where: str) -> Spec:
    if isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{where} is {value}; a number that is part of the program must be finite.")
    return {"t": "const", "v": value}


def _mapping_spec(value: Mapping[Any, Any], where: str) -> Spec:
    plain = type(value) in _PLAIN_DICTS
    entries = {k: v for k, v in value.items() if plain or v is not None}
    for key in entries:
        if not isinstance(key, str):
            raise RunError(f"{where} has the key {key!r}; keys must be texts.")
    return {
        "t": "dict" if plain else "output",
        "k": list(entries),
        "c": [spec_of(v, f"{where}[{k!r}]") for k, v in entries.items()],
    }


def flatten(spec: Spec, value: object, where: str) -> list[torch.Tensor]:
    """Return the tensors of ``value`` in the order of the spec's leaves.

    Args:
        spec: The expected nesting.
        value: What was passed. Lists and tuples stand for each other; keys may be in any order.
        where: What the value is, for errors: ``"argument 'mask'"``.

    Raises:
        RunError: If the value does not have this nesting; the message says where.
    """
    kind = spec["t"]
    if kind == "leaf":
        if isinstance(value, torch.Tensor):
            return [value]
        raise RunError(f"{where}: expected a tensor, got {describe(value)}.")
    if kind == "none":
        if value is None:
            return []
        raise RunError(
            f"{where}: expected None, as in the example inputs of compile(), got {describe(value)}."
        )
    if kind == "const":
        return _flatten_const(spec["v"], value, where)
    items = _sequence(spec, value, where) if kind in ("tuple", "list") else None
    pairs = items if items is not None else _entries(spec, value, where)
    leaves: list[torch.Tensor] = []
    for child, (place, item) in zip(spec["c"], pairs, strict=True):
        leaves.extend(flatten(child, item, place))
    return leaves


def _flatten_const(constant: object, value: object, where: str) -> list[torch.Tensor]:
    if not isinstance(value, torch.Tensor) and same_scalar(constant, value):
        return []
    raise RunError(
        f"{where}: this program was compiled for the value {constant!r}, got {describe(value)}. "
        "Pass that value, or compile again with the other one in example_inputs."
    )


def same_scalar(constant: object, value: object) -> bool:
    """Return whether two scalars are equal and both or neither are truth values."""
    return isinstance(constant, bool) == isinstance(value, bool) and constant == value


def _sequence(spec: Spec, value: object, where: str) -> list[tuple[str, object]]:
    count = len(spec["c"])
    if not isinstance(value, tuple | list):
        raise RunError(f"{where}: expected a {spec['t']} of {count}, got {describe(value)}.")
    if len(value) != count:
        raise RunError(f"{where}: expected {count} items, got {len(value)}.")
    return [(f"{where}[{i}]", item) for i, item in enumerate(value)]


def _entries(spec: Spec, value: object, where: str) -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        raise RunError(f"{where}: expected a dict, got {describe(value)}.")
    given = {k: v for k, v in value.items() if spec["t"] == "dict" or v is not None}
    missing = [key for key in spec["k"] if key not in given]
    unknown = [key for key in given if key not in spec["k"]]
    if missing or unknown:
        raise RunError(
            f"{where}: expected the keys {list(spec['k'])}; "
            f"missing: {missing or 'none'}, unknown: {unknown or 'none'}."
        )
    return [(f"{where}[{key!r}]", given[key]) for key in spec["k"]]


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    """Return the nested value whose leaves, in order, are ``leaves``.

    Raises:
        RunError: If the number of leaves is another one.
    """
    if len(leaves) != leaf_count(spec):
        raise RunError(f"expected {leaf_count(spec)} values, got {len(leaves)}.")
    return _build(spec, iter(leaves))


def _build(spec: Spec, leaves: Iterator[Any]) -> Any:
    kind = spec["t"]
    if kind == "leaf":
        return next(leaves)
    if kind == "none":
        return None
    if kind == "const":
        return spec["v"]
    items = [_build(child, leaves) for child in spec["c"]]
    if kind == "tuple":
        return tuple(items)
    if kind == "list":
        return items
    entries = dict(zip(spec["k"], items, strict=True))
    return entries if kind == "dict" else Output(entries)


def leaf_count(spec: Spec) -> int:
    """Return how many leaves a spec has."""
    if spec["t"] == "leaf":
        return 1
    return sum(leaf_count(child) for child in spec.get("c", ()))


def are_leaves(spec: Spec) -> list[bool]:
    """Return, for each leaf, None and constant of a spec in order, whether it is a leaf."""
    if spec["t"] in ("leaf", "none", "const"):
        return [spec["t"] == "leaf"]
    return [flag for child in spec["c"] for flag in are_leaves(child)]


def leaf_paths(spec: Spec, where: str = "") -> list[str]:
    """Return a name per leaf: ``logits``, ``[1]``, ``hidden_states[0]``; ``""`` for a lone one."""
    if spec["t"] == "leaf":
        return [where]
    keys = spec.get("k", range(len(spec.get("c", ()))))
    paths: list[str] = []
    for key, child in zip(keys, spec.get("c", ()), strict=True):
        step = f"[{key}]" if isinstance(key, int) else (f".{key}" if where else key)
        paths.extend(leaf_paths(child, where + step))
    return paths


def check_spec(spec: object, where: str, depth: int = 0) -> Spec:
    """Return ``spec`` if it is a well-formed spec.

    Raises:
        ArtifactError: If it is not; ``where`` names the place in the plan.
    """
    if not isinstance(spec, dict) or depth > MAX_DEPTH:
        raise ArtifactError(f"{where}: not a description of nested values: {_short(spec)}.")
    kind = spec.get("t")
    fields = {"const": {"t", "v"}, "tuple": {"t", "c"}, "list": {"t", "c"}}
    fields |= {"leaf": {"t"}, "none": {"t"}, "dict": {"t", "k", "c"}, "output": {"t", "k", "c"}}
    if not isinstance(kind, str) or set(spec) != fields.get(kind):
        raise ArtifactError(f"{where}: not a description of nested values: {_short(spec)}.")
    if kind == "const" and not (spec["v"] is None or isinstance(spec["v"], _SCALARS)):
        raise ArtifactError(f"{where}: {_short(spec['v'])} is not a JSON scalar.")
    children, keys = spec.get("c", []), spec.get("k", [])
    if not isinstance(children, list) or not isinstance(keys, list):
        raise ArtifactError(f"{where}: the entries of a {kind} must be lists.")
    if "k" in spec and not _distinct_names(keys, len(children)):
        raise ArtifactError(f"{where}: the keys of a {kind} must be distinct texts, one per entry.")
    for index, child in enumerate(children):
        check_spec(child, f"{where}[{index}]", depth + 1)
    return spec


def _distinct_names(keys: list[object], count: int) -> bool:
    return all(isinstance(k, str) for k in keys) and len({*keys}) == len(keys) == count


def describe(value: object) -> str:
    """Return a few words for a value in an error: its type, and its shape or value if short."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
