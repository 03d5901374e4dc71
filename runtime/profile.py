"""Measures a compiled model: calls as a user makes them, then calls with the time of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import OptionError
from fpcompiler.plan import Placeholder, Plan
from fpcompiler.runtime.ceilings import measure_ceilings
from fpcompiler.runtime.clocks import clock_of
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.inputs import leaf_names
from fpcompiler.runtime.memory import MemoryMeter
from fpcompiler.runtime.profile_report import Counted, Latency, Profile
from fpcompiler.runtime.roofline import linear_calls, roofline
from fpcompiler.runtime.timed_calls import Marks, measure_timeline, repeat
from fpcompiler.runtime.timeline import step_groups

WARM_UP_SECONDS: Final = 0.3
"""How long calls go on before the measured ones, after the first one."""

WARM_UP_CALLS: Final = 2
"""Calls at least before the measured ones, after the first one: the third may run a program."""

LEAST_CALLS: Final = 3
"""Calls that are measured if only the time was given, however long they take."""

MOST_TIMED: Final = 20
"""Calls at most of which every step is timed."""


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
    timed as well, for a third of that time; that costs time itself, so they give no latency. They
    run the program if there is one for these inputs, else the steps one by one.

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

    def call() -> Marks:
        executor.reset()
        clock.wait()
        first = clock.mark()
        executor.run_leaves(leaves)
        return first, clock.mark()

    (start,) = repeat(call, clock, 0.0, 1, 1)
    repeat(call, clock, WARM_UP_SECONDS, WARM_UP_CALLS, None)
    least = LEAST_CALLS if iterations is None else iterations
    latency = Latency.of(repeat(call, clock, seconds, least, iterations))
    memory = meter.read()
    graphs = executor.graphs.rows() if executor.graphs else ()
    executor.reset()
    linears = linear_calls(executor, leaves)
    most = min(iterations or MOST_TIMED, MOST_TIMED)
    timeline = measure_timeline(executor, leaves, seconds / 3, most)
    ceilings = measure_ceilings(executor.device, sum(call.bytes_read for call in linears))
    times = {
        step.outs[0]: seconds
        for step, seconds in zip(timeline.steps, timeline.step_seconds(), strict=True)
    }
    groups = step_groups(plan)
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
        roofline=roofline(linears, [times[c.result] for c in linears], ceilings),
        ceilings=ceilings,
        graphs=graphs,
    )


def _check(seconds: float, iterations: int | None) -> None:
    if not 0 < seconds < float("inf"):
        raise OptionError(f"The time to measure must be positive, not {seconds} seconds.")
    if iterations is not None and iterations < 1:
        raise OptionError(f"At least one call must be measured, not {iterations}.")


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
