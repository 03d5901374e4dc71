"""What users name as targets: one that the plan is for, and GPUs that kernels are compiled for."""

from __future__ import annotations

from collections.abc import Sequence

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.errors import OptionError, TargetError
from fpcompiler.target import TARGETS, lookup

__all__ = ["split_targets"]

_DEFAULT = "cpu"


def split_targets(target: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the target of the plan, and the architectures that it gets kernels for.

    Args:
        target: Names: ``"cpu"``, ``"cpu,sm_100a"``, ``["cpu", "sm_100a", "sm_120a"]``. Without one
            that is no GPU the plan is for the CPU, so that an artifact runs everywhere.

    Raises:
        OptionError: If a name is there twice, or there are two that a plan can be for.
        TargetError: If there is no such target.
    """
    given = target.split(",") if isinstance(target, str) else list(target)
    names = [name.strip() for name in given]
    if not names or len({*names}) != len(names):
        raise OptionError(
            f"target={target!r} must name targets, each once; see fpcompiler targets."
        )
    for name in names:
        if name not in ARCHS and name not in TARGETS:
            _refuse(name)
    plain = [name for name in names if name not in ARCHS]
    if len(plain) > 1:
        raise OptionError(
            f"target={target!r}: a plan is for one of {', '.join(plain)}; GPUs may be beside it."
        )
    return (plain or [_DEFAULT])[0], tuple(name for name in names if name in ARCHS)


def _refuse(name: str) -> None:
    try:
        lookup(name)
    except TargetError as error:
        more = ", ".join(each for each in ARCHS if each not in TARGETS)
        error.add_note(f"CUDA kernels can also be compiled for {more}")
        raise
