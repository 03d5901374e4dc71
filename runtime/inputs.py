"""From the arguments of a call to the tensors that a plan reads, with every check a user needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fpcompiler.errors import RunError
from fpcompiler.plan import Parameter, Placeholder, Signature, Symbol
from fpcompiler.tree import describe, flatten, leaf_paths, same_scalar, unflatten

_COMPILE_AGAIN = "compile the model again with example_inputs that have it"


class Takes(Protocol):
    """Says which tensors a program takes: a plan, or a captured program."""

    @property
    def placeholders(self) -> Sequence[Placeholder]:
        """The tensors, in order."""

    @property
    def symbols(self) -> Mapping[str, Symbol]:
        """The ranges of the sizes that vary."""


def bind(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a call, one per placeholder.

    Raises:
        RunError: If an argument is missing, unknown, given twice, or does not have the nesting that
            the model was captured with.
    """
    given = _by_name(signature, args, kwargs)
    leaves: list[Tensor] = []
    for parameter in signature.parameters:
        leaves.extend(_leaves(parameter, given))
    return leaves


def named(signature: Signature, leaves: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, of its tensors: what :func:`bind` takes apart."""
    given: dict[str, Any] = {}
    for parameter in signature.parameters:
        if parameter.spec is not None:
            count = len(leaf_paths(parameter.spec))
            given[parameter.name] = unflatten(parameter.spec, leaves[:count])
            leaves = leaves[count:]
    return given


def _by_name(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    names = [p.name for p in signature.parameters]
    if len(args) > len(names):
        raise RunError(
            f"The model takes {len(names)} positional arguments ({', '.join(names)}), "
            f"got {len(args)}. Leave out the last {len(args) - len(names)}."
        )
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise RunError(f"Argument {name!r} was given twice, by position and by name.")
        if name in names:
            given[name] = value
        else:
            _check_fixed(signature, name, value)
    return given


def _check_fixed(signature: Signature, name: str, value: object) -> None:
    if name not in signature.fixed:
        names = [*(p.name for p in signature.parameters), *signature.fixed]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise RunError(
            f"The model has no argument {name!r}. {hint}It takes: {', '.join(names) or 'none'}."
        )
    constant = signature.fixed[name]
    if isinstance(value, Tensor) or not same_scalar(constant, value):
        raise RunError(
            f"Argument {name!r} is fixed to {constant!r} in this program, got {describe(value)}. "
            "Leave it out, or compile the model again with the other value."
        )


def _leaves(parameter: Parameter, given: Mapping[str, Any]) -> list[Tensor]:
    name, spec = parameter.name, parameter.spec
    if spec is None:
        if name not in given:
            return []
        raise RunError(
            f"Argument {name!r} was not given when the model was captured, so the program does not "
            f"read it; got {describe(given[name])}. Leave it out, or {_COMPILE_AGAIN}."
        )
    if name in given:
        return flatten(spec, given[name], f"argument {name!r}")
    if leaf_paths(spec):
        raise RunError(
            f"Argument {name!r} is missing. It was given when the model was captured, so the "
            "program needs it."
        )
    return []


def leaf_names(signature: Signature) -> list[str]:
    """Return what each tensor of a call is called in errors: ``mask`` or ``past[0]``."""
    specs = [(p.spec, p.name) for p in signature.parameters if p.spec is not None]
    return [path for spec, name in specs for path in leaf_paths(spec, name)]


def check(
    program: Takes, names: Sequence[str], leaves: Sequence[Tensor], device: torch.device | None
) -> None:
    """Check dtypes, shapes and devices against the placeholders of a program.

    Args:
        program: The program.
        names: As returned by :func:`leaf_names`.
        leaves: The tensors of the call.
        device: Where they must be; None: anywhere.

    Raises:
        RunError: With the argument's name, what was expected, and what was given.
    """
    if len(leaves) != len(names):
        raise RunError(
            f"The program takes {len(names)} tensors ({', '.join(names)}), got {len(leaves)}."
        )
    sizes: dict[str, tuple[int, str]] = {}
    for placeholder, name, leaf in zip(program.placeholders, names, leaves, strict=True):
        if leaf.dtype != getattr(torch, placeholder.dtype):
            raise RunError(
                f"Argument {name!r}: expected {placeholder.dtype}, got "
                f"{str(leaf.dtype).removeprefix('torch.')}. Convert it with "
                f".to(torch.{placeholder.dtype})."
            )
        if device is not None and leaf.device.type != device.type:
            raise RunError(
                f"Argument {name!r} is on {leaf.device}, the model runs on {device}. Move it with "
                f".to({str(device)!r})."
            )
        if leaf.ndim != len(placeholder.shape):
            raise _shape_error(program, placeholder, name, leaf, f"it has {leaf.ndim} dimensions")
        for axis, expected in enumerate(placeholder.shape):
            problem = _size_problem(expected, leaf.shape[axis], sizes, program.symbols, name)
            if problem:
                raise _shape_error(program, placeholder, name, leaf, f"dimension {axis} {problem}")


def _size_problem(
    expected: int | str,
    size: int,
    sizes: dict[str, tuple[int, str]],
    symbols: Mapping[str, Symbol],
    name: str,
) -> str:
    """Return what is wrong with a size, or an empty text; ``sizes`` collects those of symbols."""
    if isinstance(expected, int):
        return "" if size == expected else f"must be {expected}"
    if expected not in symbols:
        return ""  # An expression of symbols; the program itself computes with the real size.
    known, owner = sizes.setdefault(expected, (size, name))
    if size != known:
        return f"must be the same as {expected} = {known} of argument {owner!r}"
    low, high = symbols[expected].min, symbols[expected].max
    if size < low or (high is not None and size > high):
        return f"must be {_range(symbols[expected])}"
    return ""


def _shape_error(
    program: Takes, placeholder: Placeholder, name: str, leaf: Tensor, problem: str
) -> RunError:
    symbols = [s for s in placeholder.shape if isinstance(s, str) and s in program.symbols]
    ranges = ", ".join(f"{s} {_range(program.symbols[s])}" for s in dict.fromkeys(symbols))
    shape = ", ".join(map(str, placeholder.shape))
    expected = f"[{shape}]{f' with {ranges}' if ranges else ''}"
    return RunError(
        f"Argument {name!r}: expected the shape {expected}, got {list(leaf.shape)}: {problem}. "
        "Pass a tensor of that shape, or compile the model again with an example of the shape you "
        "need."
    )


def _range(symbol: Symbol) -> str:
    if symbol.max is None:
        return f"at least {symbol.min}"
    return f"from {symbol.min} to {symbol.max}"
