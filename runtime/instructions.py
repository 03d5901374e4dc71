"""A step of a plan, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fpcompiler.errors import RunError, describe_layer
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.operators import Function

STEP_ERRORS: Final = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What torch operators and Python arithmetic raise."""


@dataclass(frozen=True)
class Instruction:
    """A step, ready to run.

    Attributes:
        function: What runs it.
        args, kwargs: Its arguments, decoded.
        outs: Names of the results.
        spread: Whether the results are the items of what ``function`` returns.
        frees: The values that no later step reads.
        step: What it was made of.
    """

    function: Function
    args: list[Any]
    kwargs: dict[str, Any]
    outs: tuple[str, ...]
    spread: bool
    frees: tuple[str, ...]
    step: Step


def step_error(step: Step, index: int, error: BaseException) -> RunError:
    """Return the error that a user sees where a step failed."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return RunError(
        f"{describe_layer(step.layer)}: step {index} ({step.op}) failed: {first}. If the inputs "
        "are right, run `fpcompiler verify` on the artifact and compile the model again."
    )


def last_uses(plan: Plan) -> dict[int, list[str]]:
    """Return the values that are not needed after a step; those of the result always are."""
    lasts: dict[str, int] = {}
    for index, step in enumerate(plan.steps):
        lasts.update(dict.fromkeys([*step.outs, *step.uses()], index))
    kept = {out for out in plan.outputs if isinstance(out, str)} | {v for v, _ in plan.stores}
    frees: dict[int, list[str]] = {}
    for name, index in lasts.items():
        if name not in kept:
            frees.setdefault(index, []).append(name)
    return frees
