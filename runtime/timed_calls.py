"""Runs calls and takes their time, and that of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fpcompiler.plan import Step
from fpcompiler.runtime.clocks import Clock, clock_of
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.garbage import uncollected
from fpcompiler.runtime.kernels import kernel_of, kernels_of
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.program import Program
from fpcompiler.runtime.timeline import Timeline

Marks: TypeAlias = tuple[Any, Any]
"""Start and end on a clock."""

_Times: TypeAlias = list[tuple[int, int]]
"""The index of a step and nanoseconds, in the order in which a program ran."""


def repeat(
    call: Callable[[], Marks], clock: Clock, seconds: float, least: int, most: int | None
) -> list[float]:
    """Return the times of calls: at least so many, for so long, but at most so many."""
    times, spent = list[float](), 0.0
    while len(times) < least or (spent < seconds and (most is None or len(times) < most)):
        first, second = call()
        clock.wait()
        times.append(clock.seconds(first, second))
        spent += times[-1]
    return times


def measure_timeline(
    executor: Executor, leaves: Sequence[Tensor], seconds: float, most: int
) -> Timeline:
    """Run calls, each from the initial state, and take the time of each step.

    Args:
        executor: What runs. If it has a program for these tensors, that is what is timed.
        leaves: The tensors of a call.
        seconds: How long.
        most: Calls at most; at least one is run.

    Raises:
        RunError: If the tensors do not fit, or a step fails.
        NumericsError: If a value to quantize is NaN or infinite.
    """
    program = executor.program(leaves)
    with uncollected():
        found = program and _of_program(executor, program, leaves, seconds, most)
        return found or _of_steps(executor, leaves, seconds, most)


def _of_program(
    executor: Executor, program: Program, leaves: Sequence[Tensor], seconds: float, most: int
) -> Timeline | None:
    """Return the times that the program takes itself; None if it does not fit these values."""
    clock = clock_of(executor.device)
    calls: list[Marks] = []
    spent: list[_Times] = []

    def call() -> Marks:
        executor.reset()
        clock.wait()
        spent.append([])
        first = clock.mark()
        executor.run_leaves(leaves, times=spent[-1])
        calls.append((first, clock.mark()))
        return calls[-1]

    repeat(call, clock, seconds, 1, most)
    if not all(spent):
        return None
    indices = [*dict.fromkeys(index for index, _ in spent[0])]
    kernels, steps = kernels_of(program), executor.plan.steps
    bounds = _seconds(clock, calls, calls[0][0])
    lengths = torch.tensor([_sums(times) for times in spent], dtype=torch.float64) / 1e9
    ends = bounds[:, :1] + lengths.cumsum(1)
    return Timeline(
        steps=tuple(steps[index] for index in indices),
        kernels=tuple(kernels[index] for index in indices),
        calls=bounds,
        spans=torch.stack([ends - lengths, ends], -1),
        program=True,
    )


def _sums(times: _Times) -> list[int]:
    """Return the nanoseconds of each step: one may be several operations."""
    sums: dict[int, int] = {}
    for index, nanoseconds in times:
        sums[index] = sums.get(index, 0) + nanoseconds
    return [*sums.values()]


def _of_steps(executor: Executor, leaves: Sequence[Tensor], seconds: float, most: int) -> Timeline:
    """Return the times of the steps, run one by one."""
    clock = clock_of(executor.device)
    calls: list[Marks] = []
    marks: list[list[Marks]] = []
    steps: list[tuple[Step, str]] = []

    def timed(
        step: Step, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> object:
        first = clock.mark()
        result = function(*args, **kwargs)
        marks[-1].append((first, clock.mark()))
        if len(marks) == 1:
            steps.append((step, kernel_of(step, function, args, kwargs)))
        return result

    def call() -> Marks:
        executor.reset()
        clock.wait()
        marks.append([])
        first = clock.mark()
        executor.run_leaves(leaves, caller=timed)
        calls.append((first, clock.mark()))
        return calls[-1]

    repeat(call, clock, seconds, 1, most)
    spans = torch.stack([_seconds(clock, row, calls[0][0]) for row in marks])
    return Timeline(
        steps=tuple(step for step, _ in steps),
        kernels=tuple(kernel for _, kernel in steps),
        calls=_seconds(clock, calls, calls[0][0]),
        spans=spans,
    )


def _seconds(clock: Clock, pairs: Sequence[Marks], origin: Any) -> Tensor:
    """Return marks as seconds after the origin, ``[pairs, 2]``."""
    times = [[clock.seconds(origin, mark) for mark in pair] for pair in pairs]
    return torch.tensor(times, dtype=torch.float64).reshape(len(pairs), 2)
