"""Where the time of calls goes: every step on a timeline, summed by operator, and as a trace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from torch import Tensor

from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.kernels import NATIVE
from fpcompiler.runtime.operators import QUANTIZERS

GROUPS: Final = (
    "quantized GEMM", "quantize", "attention", "float GEMM", "other operators", "interpreter",
)  # fmt: skip
"""What time goes to. ``interpreter`` is the time of a call that is in none of its steps."""

TRACED_CALLS: Final = 10
"""Calls at most that a trace shows."""

_PRODUCTS: Final = frozenset(
    {
        "matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "_convolution",
        "conv1d", "conv2d", "conv3d", "einsum",
    }
)  # fmt: skip
_SOFTMAX: Final = frozenset({"softmax", "_softmax", "_safe_softmax"})


@dataclass(frozen=True)
class OperatorRow:
    """The steps of one operator in layers of one kind.

    Attributes:
        group: One of :data:`GROUPS`.
        operator: ``fpc.linear``, ``aten.mul.Tensor``.
        kernel: What ran them: one of :mod:`fpcompiler.runtime.kernels`.
        layers: Module path with ``*`` for numbers: ``layers.*.q_proj``.
        calls: Steps in one call of the model; views take no time in a program and are none.
        seconds: Their time in one call of the model, see :meth:`Timeline.step_seconds`.
        share: That as part of the time of the call.
    """

    group: str
    operator: str
    kernel: str
    layers: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Split:
    """Parts of the time of a call, which make up 1.

    Attributes:
        native: In kernels of the native library; where steps run one by one, also in calling them.
        torch: In all other steps, which torch runs.
        between_steps: In no step: Python, or a device that waits for it.
    """

    native: float
    torch: float
    between_steps: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """Calls of a model and their steps, in seconds from the start of the first call.

    Attributes:
        steps: The steps of a call, in the order in which they ran.
        kernels: What ran each step: see :mod:`fpcompiler.runtime.kernels`.
        calls: Start and end of each call, ``[calls, 2]``.
        spans: Start and end of each step of each call, ``[calls, steps, 2]``. Those of a program
            have true lengths and lie one after the other from the start of the call on.
        program: Whether a program ran, and not the steps one by one.
    """

    steps: tuple[Step, ...]
    kernels: tuple[str, ...]
    calls: Tensor
    spans: Tensor
    program: bool = False

    @cached_property
    def quiet(self) -> Tensor:
        """The faster half of the calls: what other programs take of the machine is not theirs."""
        lengths = self.calls[:, 1] - self.calls[:, 0]
        return lengths.argsort()[: (len(lengths) + 1) // 2]

    def median_call(self) -> float:
        """Return the median time of all calls."""
        return float((self.calls[:, 1] - self.calls[:, 0]).quantile(0.5))

    def call_seconds(self) -> float:
        """Return the mean time of the faster half of the calls."""
        calls = self.calls[self.quiet]
        return float((calls[:, 1] - calls[:, 0]).mean())

    def step_seconds(self) -> list[float]:
        """Return the mean time of each step in the faster half of the calls."""
        spans = self.spans[self.quiet]
        means: list[float] = (spans[..., 1] - spans[..., 0]).mean(0).tolist()
        return means

    def split(self) -> Split:
        """Return what a call consists of, from the mean of the faster half of the calls."""
        total, pairs = self.call_seconds(), zip(self.kernels, self.step_seconds(), strict=True)
        sums = {True: 0.0, False: 0.0}
        for kernel, seconds in pairs:
            sums[kernel == NATIVE] += seconds
        native, torch = sums[True] / total, sums[False] / total
        return Split(native, torch, 1 - native - torch)

    def rows(self, groups: Mapping[str, str]) -> tuple[OperatorRow, ...]:
        """Return the time by operator and kind of layer, most first.

        Args:
            groups: The group of each step, see :func:`step_groups`.
        """
        total = self.call_seconds()
        means = self.step_seconds()
        sums: dict[tuple[str, str, str, str], tuple[int, float]] = {}
        for step, kernel, seconds in zip(self.steps, self.kernels, means, strict=True):
            key = groups[step.outs[0]], step.op, kernel, layer_kind(_layer(step))
            calls, spent = sums.get(key, (0, 0.0))
            sums[key] = calls + 1, spent + seconds
        rest = total - sum(means)
        sums["interpreter", "everything else", "", ""] = 1, rest
        rows = [OperatorRow(*key, n, time, time / total) for key, (n, time) in sums.items()]
        return tuple(sorted(rows, key=lambda row: -row.seconds))

    def trace(self, groups: Mapping[str, str]) -> dict[str, Any]:
        """Return the first calls as events for a browser's trace viewer, Perfetto or speedscope.

        The form is the "Trace Event Format" of Chromium: complete events (``ph`` is ``X``) with
        start and length in microseconds; those of steps lie within that of their call.
        """
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": 1, "name": "process_name", "args": {"name": "fpcompiler"}}
        ]
        nanoseconds = (self.calls[:TRACED_CALLS] * 1e9).round().long().tolist()
        inner = (self.spans[:TRACED_CALLS] * 1e9).round().long().tolist()
        for index, (call, spans) in enumerate(zip(nanoseconds, inner, strict=True)):
            events.append(_event(f"call {index}", "call", call, {}))
            for step, kernel, span in zip(self.steps, self.kernels, spans, strict=True):
                args = {"layer": _layer(step), "kernel": kernel, "result": step.outs[0]}
                events.append(_event(step.op, groups[step.outs[0]], span, args))
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def step_groups(plan: Plan) -> dict[str, str]:
    """Return the group of each step by its first result.

    A product of two computed tensors is attention, one with a weight is a float GEMM.
    """
    fixed = {*plan.constants}
    groups = {}
    for step in plan.steps:
        uses = {*step.uses()}
        if uses and uses <= fixed:  # A weight that was only rearranged is still a weight.
            fixed.update(step.outs)
        groups[step.outs[0]] = _group(step, bool(uses & fixed))
    return groups


def _group(step: Step, has_weight: bool) -> str:
    namespace, name = step.op.split(".")[:2]
    if namespace == "fpc":
        return "quantized GEMM" if "linear" in name else "quantize"
    if "scaled_dot_product" in name or name in _SOFTMAX:
        return "attention"
    if name in _PRODUCTS:
        return "float GEMM" if has_weight else "attention"
    return "other operators"


def layer_kind(layer: str) -> str:
    """Return a module path with ``*`` for the numbers: equal for the same layer of all blocks."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def _layer(step: Step) -> str:
    # The step of a shared quantization names no layer; its last argument is the first consumer.
    last = step.args[-1] if step.op in QUANTIZERS and step.args else ""
    return step.layer or (last if isinstance(last, str) else "")


def _event(
    name: str, category: str, span: Sequence[int], args: Mapping[str, str]
) -> dict[str, Any]:
    start, end = span
    place = {"ph": "X", "pid": 1, "tid": 1, "ts": start / 1e3, "dur": (end - start) / 1e3}
    return {"name": name, "cat": category, **place, "args": args}
