"""Guards of torch.export that hold for every size, though torch cannot tell."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

_GUARD: Final = re.compile(
    r"Not all values of (\w+) = (\S+) .* satisfy the generated guard (.+)\.$"
)
_TRIED: Final = range(1, 200)
_OPERATORS: Final[Mapping[type, Callable[..., int | bool]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv:
    operator.floordiv, ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: Final[Mapping[str, Callable[..., int]]] = {"min": min, "max": max}


def always_held(message: str) -> Iterator[str]:
    """Yield the sizes of which a constraint error doubts guards that hold for all of them.

    torch 2.11 compares ``min(16 * n, 32 * n)`` with ``16 * n`` for models of transformers with
    masks, and cannot tell.
    """
    doubts = [match.groups() for match in map(_GUARD.search, message.splitlines()) if match]
    for name in dict.fromkeys(name for name, *_ in doubts):
        guards = [guard.replace(size, "n") for other, size, guard in doubts if other == name]
        if all(_holds(guard, n) for guard in guards for n in _TRIED):
            yield name


def _holds(guard: str, n: int) -> bool:
    """Return whether a guard holds for a size; False if it is no simple expression."""
    try:
        return _value(ast.parse(guard.strip(), mode="eval").body, n) is True
    except (SyntaxError, TypeError, KeyError, ZeroDivisionError):
        return False


def _value(node: ast.expr, n: int) -> int | bool:
    match node:
        case ast.Name(id="n"):
            return n
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, n), _value(right, n))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _OPERATORS[type(op)](_value(left, n), _value(right, n))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _FUNCTIONS[name](*(_value(arg, n) for arg in args))
    raise TypeError(ast.dump(node))
