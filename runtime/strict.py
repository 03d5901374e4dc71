"""Refusing a program whose layers would not run on the kernels of their target.

Without this such layers run all the same, by torch's own products, and more slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fpcompiler.artifact.kernels import TargetKernels
from fpcompiler.errors import TargetError
from fpcompiler.native import why_missing
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import native_steps

_CPU: Final = "cpu"
_NAMED: Final = 5
_OTHERWISE: Final = "Without strict they run more slowly, with the same meaning."


def require_kernels(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    target: TargetKernels | None = None,
) -> None:
    """Check that all layers run on the kernels that they were compiled for.

    Layers that were compiled for ``reference``, or kept in high precision, are as they should be.

    Args:
        plan: The program.
        tensors: The tensors that it names.
        device: Where it is to run.
        target: The compiled kernels for the device, if there are any; otherwise the kernels are
            those of the native library.

    Raises:
        TargetError: If it does not; the message names the layers, the causes and what to do.
    """
    if target is not None:
        _require_all(target)
        return
    constants = {name: tensors[key] for name, key in plan.constants.items() if key in tensors}
    causes: dict[str, dict[str, None]] = {}
    for step in plan.steps:
        if step.op == "fpc.linear" and step.kernel == _CPU:
            cause = _refusal(step, constants, device)
            if cause:
                causes.setdefault(cause, {})[step.layer or step.outs[0]] = None
    if causes:
        texts = [f"{_names([*layers])}: {cause}" for cause, layers in causes.items()]
        raise TargetError(
            f"strict: layers of the target cpu that the native library would not run: "
            f"{'; '.join(texts)}. {_OTHERWISE}"
        )


def _require_all(target: TargetKernels) -> None:
    causes: dict[str, list[str]] = {}
    for name, row in target.layers.items():
        if not row.kernels:
            causes.setdefault(row.reason, []).append(name)
    if causes:
        texts = [f"{_names(layers)}: {cause}" for cause, layers in causes.items()]
        raise TargetError(
            f"strict: layers without a kernel for the target {target.target}: {'; '.join(texts)}. "
            f"{_OTHERWISE}"
        )


def require_library(target: str) -> None:
    """Check, before the work of compiling, that what any layer of a target needs is there.

    Raises:
        TargetError: If it is not; the message says why and what to do.
    """
    missing = why_missing() if target == _CPU else None
    if missing:
        raise TargetError(f"strict: no layer of the target cpu would run natively: {missing}.")


def _refusal(step: Step, constants: Mapping[str, Tensor], device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU only, not on {device}"
    return native_steps.refusal(step, constants)


def _names(layers: list[str]) -> str:
    more = len(layers) - _NAMED
    return ", ".join(layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")


__all__ = ["require_kernels", "require_library"]
