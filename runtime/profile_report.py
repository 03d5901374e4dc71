"""What :func:`fpcompiler.runtime.profile.profile` measures: numbers, tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fpcompiler.runtime.ceilings import Ceilings
from fpcompiler.runtime.cuda.graphs import GraphRow
from fpcompiler.runtime.kernels import NATIVE
from fpcompiler.runtime.memory import Memory
from fpcompiler.runtime.roofline import RooflineRow
from fpcompiler.runtime.tables import as_text, size_text
from fpcompiler.runtime.timeline import GROUPS, OperatorRow, Timeline, layer_kind


@dataclass(frozen=True)
class Counted:
    """What one call does.

    Attributes:
        items: Entries of axis 0 of the first input.
        tokens: Integers in the first input if it is ``[batch, length]``; None otherwise.
        text: That in words.
    """

    items: int
    tokens: int | None
    text: str


@dataclass(frozen=True)
class Latency:
    """Seconds of calls; a percentile lies between two of them, in proportion."""

    calls: int
    min: float
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Latency:
        """Return the figures of some times."""
        values = torch.tensor(times, dtype=torch.float64)
        levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
        percentiles = torch.quantile(values, levels).tolist()
        return cls(len(times), float(values.min()), float(values.mean()), *percentiles)


@dataclass(frozen=True, eq=False)
class Profile:
    """How fast a model runs, where the time goes, and what the machine allows.

    Attributes:
        device: Where it ran.
        threads: Threads of the CPU.
        inputs: Name, dtype and shape of each tensor of a call.
        state: How many tensors live from call to call; all were reset before each call.
        counted: What one call does.
        first_call: Seconds of the first call; if the model is new, it reads the weights.
        latency: Of the calls after the warm-up, without the time of each step being taken.
        memory: While they ran.
        timeline: Of the calls of which each step was timed.
        groups: :data:`GROUPS` by the first result of a step.
        rows: Their time by operator.
        roofline: Their quantized layers against the ceilings.
        ceilings: Of the machine.
        graphs: On a GPU, whether the calls replayed a CUDA graph, or why not; those of which each
            step was timed ran step by step.
    """

    device: str
    threads: int
    inputs: tuple[str, ...]
    state: int
    counted: Counted
    first_call: float
    latency: Latency
    memory: Memory
    timeline: Timeline
    groups: Mapping[str, str]
    rows: tuple[OperatorRow, ...]
    roofline: tuple[RooflineRow, ...]
    ceilings: Ceilings
    graphs: tuple[GraphRow, ...] = ()

    @property
    def items_per_second(self) -> float:
        """Items a second at the median latency."""
        return self.counted.items / self.latency.p50

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second at the median latency; None if no tokens are counted."""
        return None if self.counted.tokens is None else self.counted.tokens / self.latency.p50

    def group_seconds(self) -> dict[str, tuple[int, float]]:
        """Return the steps and the seconds of a call by group, in the order of GROUPS."""
        sums = dict.fromkeys(GROUPS, (0, 0.0))
        for row in self.rows:
            calls, seconds = sums[row.group]
            sums[row.group] = calls + row.calls, seconds + row.seconds
        return {group: entry for group, entry in sums.items() if entry[0]}

    def trace(self) -> dict[str, Any]:
        """Return the first timed calls in Chromium's trace event format, as JSON values."""
        return self.timeline.trace(self.groups)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; times are in seconds."""
        total = self.timeline.call_seconds()
        return {
            "device": self.device,
            "threads": self.threads,
            "inputs": list(self.inputs),
            "state": self.state,
            "counted": asdict(self.counted),
            "items_per_second": self.items_per_second,
            "tokens_per_second": self.tokens_per_second,
            "first_call": self.first_call,
            "latency": asdict(self.latency),
            "memory": {**asdict(self.memory), "growth": self.memory.growth},
            "timed_calls": {
                "calls": len(self.timeline.calls),
                "p50": self.timeline.median_call(),
                "faster_half_mean": total,
            },
            "program": self.timeline.program,
            "graphs": [asdict(row) for row in self.graphs],
            "split": asdict(self.timeline.split()),
            "groups": [
                {"group": group, "calls": calls, "seconds": time, "share": time / total}
                for group, (calls, time) in self.group_seconds().items()
            ],
            "operators": [asdict(row) for row in self.rows],
            "ceilings": self.ceilings.to_json(),
            "roofline": [row.to_json() for row in self.roofline],
        }

    def tables(self, top: int = 15) -> tuple[RenderableType, ...]:
        """Return the summary, the time by group and operator, and the roofline.

        Args:
            top: How many rows of operators and of layers are shown.
        """
        found = _summary(self), _group_table(self), _operator_table(self.rows, top)
        return (*found, _roofline_table(self, top)) if self.roofline else found

    def __rich__(self) -> Group:
        """Return the tables for a rich console."""
        return Group(*self.tables())

    def __str__(self) -> str:
        """Return the tables as plain text."""
        return "\n\n".join(map(as_text, self.tables()))


def _summary(profile: Profile) -> Table:
    latency, tokens = profile.latency, profile.tokens_per_second
    rate = f"{_rate(profile.items_per_second)} items/s"
    rate += "" if tokens is None else f", {_rate(tokens)} tokens/s"
    spread = [(name, getattr(latency, name)) for name in ("p50", "p90", "p99", "min")]
    rows = {
        "where": f"{profile.device}, {profile.threads} thread{'s' * (profile.threads > 1)}",
        "inputs": ", ".join(profile.inputs),
        "throughput": f"{rate} at the median latency",
        "counted": profile.counted.text,
        "latency": ", ".join(f"{name} {_ms(value)} ms" for name, value in spread)
        + f" over {latency.calls} calls; first call {_ms(profile.first_call)} ms",
        "time": _split_text(profile),
        "memory": _memory_text(profile.memory),
        "ceilings": _ceilings_text(profile.ceilings),
    }
    if profile.state:
        tensors = "tensor" if profile.state == 1 else "tensors"
        rows["state"] = f"{profile.state} {tensors}, reset before each call, which is not counted"
    if profile.graphs:
        rows["graphs"] = "; ".join(map(str, profile.graphs))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    return table


def _split_text(profile: Profile) -> str:
    timeline = profile.timeline
    split = timeline.split()
    count = timeline.kernels.count(NATIVE)
    way = "calls run as a program" if timeline.program else "steps run one by one"
    rest = "between steps (Python)" if profile.device == "cpu" else "between steps"
    return (
        f"{split.native:.1%} in native kernels ({_steps(count)}), {split.torch:.1%} in torch "
        f"({_steps(len(timeline.steps) - count)}), {split.between_steps:.1%} {rest}; {way}"
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _memory_text(memory: Memory) -> str:
    if memory.peak is None or memory.growth is None:
        text = "the system does not tell"
    else:
        of = "during the calls" if memory.peak_of_calls else "since the process started"
        text = f"peak {size_text(memory.peak)} {of}, {size_text(memory.growth)} more than before"
    if memory.loading is not None:
        text += f", which loading had made {size_text(max(memory.loading, 0))} larger"
    if memory.device_peak is not None:
        text += f"; peak on the device {size_text(memory.device_peak)}"
    return text


def _ceilings_text(ceilings: Ceilings) -> str:
    peaks = ", ".join(f"{name} {rate / 1e9:,.4g}" for name, rate in ceilings.peaks.items())
    how = "loops of the native library" if ceilings.source == "native" else "operators of torch"
    return (
        f"memory {ceilings.memory / 1e9:.3g} GB/s, {ceilings.set_read / 1e9:.3g} GB/s over the "
        f"{size_text(ceilings.set_bytes)} that the quantized layers read; {peaks} Gop/s ({how})"
    )


def _group_table(profile: Profile) -> RenderableType:
    total = profile.timeline.call_seconds()
    extra = profile.timeline.median_call() / profile.latency.p50 - 1
    table = _table("time by group", "group", "steps", "ms", "share")
    for group, (steps, seconds) in profile.group_seconds().items():
        table.add_row(group, str(steps), _ms(seconds), f"{seconds / total:.1%}")
    table.add_row("all", "", _ms(total), "100.0%", style="bold")
    note = (
        f"mean of the faster half of {len(profile.timeline.calls)} calls with every step timed, "
        f"whose median is {extra:+.1%} beside the one without"
    )
    return Group(table, Text(note))


def _operator_table(rows: Sequence[OperatorRow], top: int) -> RenderableType:
    table = _table("time by operator", "calls", "ms", "share", "operator", "kernel", "layers")
    for row in rows[:top]:
        numbers = str(row.calls), _ms(row.seconds), f"{row.share:.1%}"
        table.add_row(*numbers, Text(row.operator), row.kernel, Text(row.layers))
    hidden = rows[top:]
    if not hidden:
        return table
    rest = sum(row.share for row in hidden)
    return Group(table, Text(f"{len(hidden)} more rows take {rest:.1%}"))


def _roofline_table(profile: Profile, top: int) -> RenderableType:
    kinds: dict[tuple[str, str], list[RooflineRow]] = {}
    for row in profile.roofline:
        shape = f"{row.call.m} x {row.call.n} x {row.call.k}"
        kinds.setdefault((layer_kind(row.call.layer), shape), []).append(row)
    order = sorted(kinds.items(), key=lambda entry: -sum(row.seconds for row in entry[1]))
    columns = "calls", "us", "bound us", "reached", "limit", "read", "Mop", "M x N x K", "layers"
    table = _table("roofline of the quantized layers", *columns)
    for (layers, shape), rows in order[:top]:
        table.add_row(*_roofline_cells(rows), shape, Text(layers))
    table.add_row(*_roofline_cells(profile.roofline), "", "all", style="bold")
    hidden = len(order[top:])
    return Group(table, Text(f"{hidden} more rows count in the last one")) if hidden else table


def _roofline_cells(rows: Sequence[RooflineRow]) -> tuple[str, ...]:
    seconds, bound = sum(row.seconds for row in rows), sum(row.bound_seconds for row in rows)
    read, work = sum(row.call.bytes_read for row in rows), sum(row.call.operations for row in rows)
    limits = ", ".join(sorted({row.limit for row in rows}))
    reached = f"{bound / seconds:.1%}" if seconds else "-"
    sizes = size_text(read), f"{work / 1e6:,.4g}"
    times = f"{seconds * 1e6:,.1f}", f"{bound * 1e6:,.1f}"
    return str(len(rows)), *times, reached, limits, *sizes


_LEFT: Final = frozenset({"group", "operator", "kernel", "layers", "limit", "M x N x K"})
"""Columns of words."""


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    return table


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 1000 else f"{per_second:.4g}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
