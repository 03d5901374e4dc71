"""One call of a model: its arguments by name, and which of them become part of the program."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpcompiler import tree
from fpcompiler.errors import CaptureError, RunError
from fpcompiler.plan import Parameter

Scalar: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True)
class Leaf:
    """A tensor among the arguments; ``name`` says where: ``mask``, ``states[0]``."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of the example call.

    Attributes:
        args: Positional arguments.
        kwargs: Arguments given by keyword, in the order of ``forward``, without the constants.
        constants: Keyword arguments that are no tensors: part of the program.
        parameters: One per parameter of ``forward``, in order; a scalar, given or by default, is a
            constant of the program.
        fixed: Scalars that ``forward`` takes as ``**kwargs``.
        leaves: The tensors, in the order in which torch.export numbers them.
        extra: Names of the arguments that ``forward`` takes as ``**kwargs``, constants left out.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    constants: Mapping[str, Scalar]
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Scalar]
    leaves: tuple[Leaf, ...]
    extra: tuple[str, ...] = ()

    def with_tensors(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other tensors in place of the leaves."""
        remaining = iter(tensors)
        swapped: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, lambda _: next(remaining), (self.args, dict(self.kwargs))
        )
        return swapped


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Bind example inputs to the parameters of ``model.forward``.

    A Hugging Face model gets ``use_cache=False`` unless the call says otherwise: a cache of past
    keys and values is a Python object, and an exported program can only return tensors.

    Raises:
        CaptureError: If the inputs do not fit ``forward``, or hold something other than tensors,
            scalars and containers of them.
    """
    if not isinstance(args, tuple | list):
        raise CaptureError(
            f"The example inputs are {tree.describe(args)}; expected a tuple with one entry per "
            "positional argument of the model. Write (x,) for a single tensor."
        )
    given = {**_cache_off(model, args, kwargs), **kwargs}
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise CaptureError(
            f"The example inputs do not fit {type(model).__name__}.forward: {error}.\n"
            f"Fix: give the arguments without a default: {', '.join(_written(signature))}."
        ) from error
    named = list(_named_values(signature, bound.arguments))
    order = [name for name, _ in named]
    by_keyword = {name: given[name] for name in sorted(given, key=order.index)}
    constants = {name: value for name, value in by_keyword.items() if _is_scalar(value)}
    kept = {name: value for name, value in by_keyword.items() if name not in constants}
    fixed = {name: v for name, v in constants.items() if name not in signature.parameters}
    return Call(
        args=tuple(args),
        kwargs=kept,
        constants=constants,
        parameters=tuple(parameter(*pair) for pair in named if pair[0] not in fixed),
        fixed=fixed,
        leaves=tuple(_leaves(named)),
        extra=tuple(name for name in kept if name not in signature.parameters),
    )


def parameter(name: str, value: object) -> Parameter:
    """Describe a parameter of ``forward`` that got ``value`` (``inspect.Parameter.empty``: none).

    Raises:
        CaptureError: If the value cannot be an input.
    """
    if value is inspect.Parameter.empty:
        return Parameter(name)
    try:
        return Parameter(name, tree.spec_of(value, f"argument {name!r}"))
    except RunError as error:
        raise CaptureError(f"The model cannot be captured with these inputs: {error}") from error


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def _cache_off(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, bool]:
    parameters = list(inspect.signature(model.forward).parameters)
    if not hasattr(model, "config") or "use_cache" not in parameters:
        return {}
    by_position = parameters.index("use_cache") < len(args)
    return {} if by_position or "use_cache" in kwargs else {"use_cache": False}


def _written(signature: inspect.Signature) -> Iterator[str]:
    """Yield each parameter without its annotation."""
    for declared in signature.parameters.values():
        yield str(declared.replace(annotation=inspect.Parameter.empty))


def _named_values(
    signature: inspect.Signature, given: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each parameter in order; one that was left out has its default."""
    for name, declared in signature.parameters.items():
        if declared.kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{i}", value) for i, value in enumerate(given.get(name, ())))
        elif declared.kind is inspect.Parameter.VAR_KEYWORD:
            yield from given.get(name, {}).items()
        elif name in given:
            yield name, given[name]
        else:
            usable = _is_scalar(declared.default)
            yield name, declared.default if usable else inspect.Parameter.empty


def _leaves(named: list[tuple[str, Any]]) -> Iterator[Leaf]:
    for name, value in named:
        spec = parameter(name, value).spec
        if spec is None:
            continue
        tensors = tree.flatten(spec, value, name)
        numbered = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if [*map(id, tensors)] != [*map(id, numbered)]:
            raise CaptureError(
                f"Argument {name!r} is a {type(value).__name__}, which torch.export does not take "
                "apart the way it iterates. Pass a plain tuple, list or dict."
            )
        for path, tensor in zip(tree.leaf_paths(spec, name), tensors, strict=True):
            yield Leaf(path, tensor)
