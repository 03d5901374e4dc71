"""The backends: what runs the ``fpc`` operators of a step, chosen by the step's ``kernel``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

from torch import Tensor

from fpcompiler.errors import ArtifactError
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import native_steps
from fpcompiler.runtime.operators import resolve
from fpcompiler.runtime.program.attention import NativeAttention
from fpcompiler.runtime.reproducible import reproducible

_ATTENTION: Final = "aten.scaled_dot_product_attention.default"


class Backend(Protocol):
    """Something that can run the ``fpc`` operators."""

    @property
    def name(self) -> str:
        """What ``Step.kernel`` says."""

    def bind(self, step: Step, constants: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Return the function that is called with the step's arguments at each run.

        Args:
            step: The step. A backend may prepare here what depends only on constants.
            constants: The constants of the plan by value name, on the executor's device.

        Raises:
            ArtifactError: If the backend cannot run this step.
        """


@dataclass(frozen=True)
class ReferenceBackend:
    """Plain torch, on any device; see :mod:`fpcompiler.runtime.reference`."""

    name: str = "reference"

    def bind(self, step: Step, constants: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Return the operator itself."""
        return resolve(step.op)


@dataclass(frozen=True)
class CpuBackend:
    """The native library where it takes a layer; torch where there is none; or the reference."""

    name: str = "cpu"

    def bind(self, step: Step, constants: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Return the native layer, or that of torch's products, or else the operator."""
        return native_steps.bind_layer(step, constants) or resolve(step.op)


_ROWS: Final[tuple[Backend, ...]] = (ReferenceBackend(), CpuBackend())

BACKENDS: Final[Mapping[str, Backend]] = MappingProxyType({row.name: row for row in _ROWS})
"""Every backend by name."""


def bind(step: Step, constants: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return what runs a step: an aten or scalar function, or what its backend gives.

    Raises:
        ArtifactError: If the operator or the backend is unknown or refused.
    """
    if not step.op.startswith("fpc."):
        return resolve(step.op)
    name = step.kernel or "reference"
    if name not in BACKENDS:
        raise ArtifactError(
            f"The plan wants the kernel {name!r} for {step.layer or step.op}; this fpcompiler has "
            f"{', '.join(BACKENDS)}. Install the version that wrote the artifact, or compile for "
            "another target."
        )
    return BACKENDS[name].bind(step, constants)


def bind_plan(
    plan: Plan,
    constants: Mapping[str, Tensor],
    release: Callable[[], None] | None = None,
    same_everywhere: bool = False,
) -> list[Callable[..., Any]]:
    """Return what runs each step of a plan; steps that know each other agree on what they pass.

    Args:
        plan: The plan.
        constants: Its constants by value name.
        release: Called after a backend has prepared a step: it may have copied its constants.
        same_everywhere: Whether operators of torch are those of
            :func:`~fpcompiler.runtime.reproducible.reproducible`.

    Raises:
        ArtifactError: If an operator or a backend is unknown or refused.
    """
    bound = []
    for step in plan.steps:
        bound.append(bind(step, constants))
        if release is not None and step.kernel:
            release()
    functions = native_steps.share_inputs(plan, bound)
    if same_everywhere:
        return [reproducible(step, f) for f, step in zip(functions, plan.steps, strict=True)]
    if any(step.kernel == CpuBackend.name for step in plan.steps):
        return [_native_attention(f, step) for f, step in zip(functions, plan.steps, strict=True)]
    return functions


def _native_attention(function: Callable[..., Any], step: Step) -> Callable[..., Any]:
    return NativeAttention(function) if step.op == _ATTENTION else function
