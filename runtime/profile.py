"""Measures a compiled model: calls as a user makes them, then calls with the time of every step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from fpcompiler.errors import OptionError
from fpcompiler.plan import Placeholder, Plan, Step
from fpcompiler.runtime.ceilings import measure_ceilings
from fpcompiler.runtime.clocks import Clock, clock_of
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.inputs import leaf_names
from fpcompiler.runtime.memory import MemoryMeter
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.profile_report import Counted, Latency, Profile
from fpcompiler.runtime.roofline import linear_calls, roofline
from fpcompiler.runtime.timeline import Timeline, step_groups

WARM_UP_SECONDS: Final = 0.3
"""How long calls go on before the measured ones; one that takes longer is repeated once."""

LEAST_CALLS: Final = 3
"""Calls that are measured if only the time was given, however long they take."""

MOST_TIMED: Final = 20
"""Calls at most of which every step is timed."""

_Marks: TypeAlias = tuple[Any, Any]


def profile(
    executor: Executor,
    leaves: Sequence[Tensor],
    *,
    seconds: float = 2.0,
    iterations: int | None = None,
) -> Profile:
    """Measure how fast a program runs, where the time goes, and what the machine allows.

    The first call and some more warm up. Then calls are timed one by one, each from the initial
    state, which is brought back before the clock starts. Then calls are run of which each step is
    timed as well, for a third of that time; that costs time itself, so they give no latency.

    Args:
        executor: The program. Its state stays as it is: the calls have one of their own.
        leaves: The tensors of a call, one per placeholder, on the executor's device.
        seconds: How long calls are timed.
        iterations: How many calls are timed instead.

    Raises:
        OptionError: If the time or the number is not positive.
        RunError: If the tensors do not fit, or a step fails.
        NumericsError: If a value to quantize is NaN or infinite.
    """
    _check(seconds, iterations)
    plan, executor = executor.plan, executor.fresh()
    clock = clock_of(executor.device)
    meter = MemoryMeter(executor.device)

    def call() -> _Marks:
        executor.reset()
        clock.wait()
        first = clock.mark()
        executor.run_leaves(leaves)
        return first, clock.mark()

    (start,) = _repeat(call, clock, 0.0, 1, 1)
    _repeat(call, clock, WARM_UP_SECONDS, 1, None)
    least = LEAST_CALLS if iterations is None else iterations
    latency = Latency.of(_repeat(call, clock, seconds, least, iterations))
    memory = meter.read()
    executor.reset()
    linears = linear_calls(executor, leaves)
    most = min(iterations or MOST_TIMED, MOST_TIMED)
    timeline = _timeline(executor, leaves, seconds / 3, most)
    ceilings = measure_ceilings(executor.device, sum(call.bytes_read for call in linears))
    times, groups = timeline.step_seconds(), step_groups(plan)
    return Profile(
        device=str(executor.device),
        threads=torch.get_num_threads(),
        inputs=_describe(plan, leaves),
        state=len(plan.state),
        counted=_count(plan.placeholders, leaf_names(plan.signature), leaves),
        first_call=start,
        latency=latency,
        memory=memory,
        timeline=timeline,
        groups=groups,
        rows=timeline.rows(groups),
        roofline=roofline(linears, [times[c.step] for c in linears], ceilings),
        ceilings=ceilings,
    )


def _check(seconds: float, iterations: int | None) -> None:
    if not 0 < seconds < float("inf"):
        raise OptionError(f"The time to measure must be positive, not {seconds} seconds.")
    if iterations is not None and iterations < 1:
        raise OptionError(f"At least one call must be measured, not {iterations}.")


def _repeat(
    call: Callable[[], _Marks], clock: Clock, seconds: float, least: int, most: int | None
) -> list[float]:
    """Return the times of calls: at least so many, for so long, but at most so many."""
    times, spent = list[float](), 0.0
    while len(times) < least or (spent < seconds and (most is None or len(times) < most)):
        first, second = call()
        clock.wait()
        times.append(clock.seconds(first, second))
        spent += times[-1]
    return times


def _timeline(executor: Executor, leaves: Sequence[Tensor], seconds: float, most: int) -> Timeline:
    """Run calls and take the time of each step."""
    clock = clock_of(executor.device)
    calls: list[_Marks] = []
    marks: list[list[_Marks]] = []
    steps: list[Step] = []

    def timed(
        step: Step, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> object:
        first = clock.mark()
        result = function(*args, **kwargs)
        marks[-1].append((first, clock.mark()))
        if len(marks) == 1:
            steps.append(step)
        return result

    def call() -> _Marks:
        executor.reset()
        clock.wait()
        marks.append([])
        first = clock.mark()
        executor.run_leaves(leaves, caller=timed)
        calls.append((first, clock.mark()))
        return calls[-1]

    # Thousands of marks are alive: collecting them again and again would count as time of steps.
    enabled = gc.isenabled()
    gc.disable()
    try:
        _repeat(call, clock, seconds, 1, most)
    finally:
        if enabled:
            gc.enable()
    origin = calls[0][0]

    def times(pairs: Sequence[_Marks]) -> list[list[float]]:
        return [[clock.seconds(origin, mark) for mark in pair] for pair in pairs]

    spans = torch.tensor([times(row) for row in marks], dtype=torch.float64)
    spans = spans.reshape(len(calls), len(steps), 2)
    return Timeline(tuple(steps), torch.tensor(times(calls), dtype=torch.float64), spans)


def _describe(plan: Plan, leaves: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(
        f"{name} {str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
        for name, leaf in zip(leaf_names(plan.signature), leaves, strict=True)
    )


def _count(
    placeholders: Sequence[Placeholder], names: Sequence[str], leaves: Sequence[Tensor]
) -> Counted:
    """Return what one call does: see :class:`Counted`."""
    if not leaves or not leaves[0].ndim:
        return Counted(1, None, "an item is a call")
    first, name, dtype = leaves[0], names[0], placeholders[0].dtype
    items, text = len(first), f"an item is one entry of axis 0 of {name!r}: {len(first)} a call"
    if first.ndim != 2 or not dtype.startswith(("int", "uint")):
        return Counted(items, None, text)
    tokens = f"a token is one id of {name!r}: {' x '.join(map(str, first.shape))} a call"
    return Counted(items, first.numel(), f"{text}; {tokens}")
