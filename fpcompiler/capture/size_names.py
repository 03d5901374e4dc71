"""Names of the sizes that vary: the user's where there are some, else made of the inputs' names.

torch.export calls sizes ``s77``. Names are what a user writes and reads later: in ``--size``, in
errors, and in exported files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import SymInt, Tensor
from torch.export import Dim

from fpcompiler.capture.dynamic import Axis

__all__ = ["names_of_dims", "symbol_names"]


def names_of_dims(values: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[Axis, str]:
    """Return the name of each dimension for which a user gave a ``Dim``.

    Args:
        values: The arguments of the example call by name, in order.
        shapes: Their ``dynamic_shapes``.
    """
    entries = [entry for name, v in values.items() for entry in _entries(v, shapes.get(name))]
    return {(leaf, axis): name for leaf, entry in enumerate(entries) for axis, name in _axes(entry)}


def _entries(value: Any, entry: Any) -> Iterator[Any]:
    """Yield the entry of each tensor in a nested value, None where there is none."""
    if isinstance(value, Tensor):
        yield entry
    elif isinstance(value, Mapping):
        known = entry if isinstance(entry, Mapping) else {}
        for key, item in value.items():
            yield from _entries(item, known.get(key))
    elif isinstance(value, tuple | list):
        rest = entry if isinstance(entry, tuple | list) else [None] * len(value)
        for item, own in zip(value, rest, strict=False):
            yield from _entries(item, own)


def _axes(entry: Any) -> Iterator[tuple[int, str]]:
    pairs = enumerate(entry) if isinstance(entry, tuple | list) else dict(entry or {}).items()
    for axis, dim in pairs:
        root = getattr(dim, "root", dim)  # Of a size such as 2*n it is n that has a name.
        if isinstance(root, Dim):
            yield axis, root.__name__


def symbol_names(inputs: Sequence[tuple[str, Tensor]], given: Mapping[Axis, str]) -> dict[str, str]:
    """Return a name for each symbol that torch.export gave to a size of an input.

    Args:
        inputs: Names and fake tensors of the inputs.
        given: Names by leaf and dimension.
    """
    wanted: dict[str, str] = {}
    for leaf, (name, tensor) in enumerate(inputs):
        sizes: list[Any] = list(tensor.shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, SymInt):
                expression = size.node.expr
                derived = f"{name}_dim{axis}" if expression.is_symbol else ""
                own = given.get((leaf, axis), derived)
                if own and len(expression.free_symbols) == 1:
                    wanted.setdefault(str(*expression.free_symbols), own)
    names: dict[str, str] = {}
    for symbol, name in wanted.items():
        # Readers of plans take no other letters.
        unique = name if name.isascii() else symbol
        while unique in names.values():
            unique += "_"
        names[symbol] = unique
    return names
