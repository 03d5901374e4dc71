"""What users name as targets: one that the plan is for, and GPUs that kernels are compiled for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.errors import OptionError, TargetError
from fpcompiler.runtime.costs import GPUS, MEASURED
from fpcompiler.target import TARGETS, lookup

__all__ = ["split_targets", "kept_on", "arch_for"]

_DEFAULT = "cpu"
_CUDA = "cuda"


def split_targets(target: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the target of the plan, and the architectures that it gets kernels for.

    Args:
        target: Names: ``"cpu"``, ``"cpu,sm_100a"``, ``["cpu", "sm_100a", "sm_120a"]``. Without one
            that is no GPU the plan is for the CPU, so that an artifact runs everywhere. ``cuda``
            is the GPU of this machine.

    Raises:
        OptionError: If a name is there twice, or there are two that a plan can be for.
        TargetError: If there is no such target, or for ``cuda`` no GPU that kernels are for.
    """
    names = _names_of(target)
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


def kept_on(target: str | Sequence[str], keep_if_slower: bool | None) -> tuple[str, ...]:
    """Return the GPUs on which layers that would be slower quantized stay in high precision.

    Args:
        target: As for :func:`split_targets`, which accepted it.
        keep_if_slower: None: those that are named if nothing else is and layers were timed on all
            of them, since what is kept is kept everywhere, and a CPU or a GPU that was only
            estimated may gain. True: the GPUs that are named. False: none.

    Raises:
        OptionError: If it is True and there are no times, measured or estimated, for any of them.
    """
    names = _names_of(target)
    if keep_if_slower is None:
        return tuple(names) if {*names} <= {*MEASURED} else ()
    if not keep_if_slower:
        return ()
    machines = [ARCHS[name].target for name in names if name in ARCHS]
    found = tuple(dict.fromkeys(machine for machine in machines if machine in GPUS))
    if not found:
        raise OptionError(
            f"keep_if_slower=True compares with bf16 on a GPU, and target={target!r} names none. "
            f"There are times for {', '.join(GPUS)}: add one, or leave the option out."
        )
    return found


def arch_for(capability: tuple[int, int]) -> str:
    """Return the architecture for a GPU; of several, the one for the fewest other GPUs.

    Args:
        capability: Its compute capability, such as ``(9, 0)``.

    Raises:
        TargetError: If there are no kernels for it; the message says which GPUs have some.
    """
    found = [arch for arch in ARCHS.values() if capability in arch.capabilities]
    if found:
        return min(found, key=lambda arch: len(arch.capabilities)).name
    known = sorted({each for arch in ARCHS.values() for each in arch.capabilities})
    raise TargetError(
        f"The GPU of this machine has compute capability {capability[0]}.{capability[1]}, and "
        f"there are kernels for {', '.join(f'{a}.{b}' for a, b in known)} only. Compile for the "
        "target reference: it runs on every GPU of torch."
    )


def _names_of(target: str | Sequence[str]) -> list[str]:
    given = target.split(",") if isinstance(target, str) else list(target)
    return [_named(name.strip()) for name in given]


def _named(name: str) -> str:
    if name != _CUDA:
        return name
    if not torch.cuda.is_available():
        raise TargetError(
            "The target 'cuda' is the GPU of this machine, and torch finds none here. Name the GPU "
            "that the model is for: sm_90a (H100, H200), sm_100a (B200), sm_120a (RTX 50)."
        )
    return arch_for(torch.cuda.get_device_capability())


def _refuse(name: str) -> None:
    try:
        lookup(name)
    except TargetError as error:
        more = ", ".join(each for each in ARCHS if each not in TARGETS)
        error.add_note(f"CUDA kernels can also be compiled for {more}")
        raise
