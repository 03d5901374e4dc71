"""Which kernels of attention a plan can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fpcompiler.plan import Step
from fpcompiler.runtime.cuda.attention import OPERATOR, AttendProblem, Call, problem_of
from fpcompiler.runtime.cuda.cached import caches_of
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.operators import Function

__all__ = ["attend_problems"]


def attend_problems(executor: Executor, leaves: Sequence[Tensor]) -> tuple[AttendProblem, ...]:
    """Return what kernels must be made for to run the attention of a plan for a few queries.

    A plan does not say of what types its values are, so a call is run. Its results are thrown away,
    and the state of the executor stays as it is. Plans without a state are left out: they compute
    keys for all their queries at once, of which there are many.

    Args:
        executor: Runs the plan, anywhere.
        leaves: The tensors of a call, such as the recorded one.
    """
    plan = executor.plan
    found: dict[AttendProblem, None] = {}
    if not plan.state or not any(step.op == OPERATOR for step in plan.steps):
        return ()

    formats = {plan.steps[i].outs[0]: pair[0].format for i, pair in caches_of(plan).items()}

    def look(step: Step, function: Function, args: list[Any], kwargs: dict[str, Any]) -> Any:
        problem = problem_of(Call.of(tuple(args), kwargs)) if step.op == OPERATOR else None
        if problem is not None:
            cache = formats.get(step.outs[0], "") if problem.type == "bf16" else ""
            found[replace(problem, cache=cache)] = None
        return function(*args, **kwargs)

    executor.fresh().run_leaves(leaves, caller=look)
    return tuple(found)
