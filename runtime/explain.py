"""What is predicted of each layer on a GPU: its time, and how many times as fast as bf16 it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.table import Table
from rich.text import Text

from fpcompiler.artifact import Artifact
from fpcompiler.artifact.kernels import KernelIndex
from fpcompiler.errors import OptionError
from fpcompiler.operand import Operand
from fpcompiler.plan import LayerRow, Plan, Step
from fpcompiler.runtime.costs import (
    GPUS,
    MEASURED,
    SLOWER,
    LayerCall,
    Prediction,
    bf16_microseconds,
    predict,
    source_of,
)
from fpcompiler.runtime.layer_steps import arguments_of
from fpcompiler.runtime.ops import LINEAR_STEP
from fpcompiler.runtime.tables import as_text
from fpcompiler.target import TARGETS

TOKENS: Final = (1, 16, 2048)
"""Of a call that generates text, for one and for 16 at once, and of a long prompt."""

_TRANSPOSED: Final = ("mm", "matmul", "addmm")
_PRODUCTS: Final = ("linear", *_TRANSPOSED)


@dataclass(frozen=True)
class ExplainRow:
    """What is predicted of one layer.

    Attributes:
        layer: Its name.
        n: Output channels.
        k: Input channels.
        formats: Of weights and activations.
        quantized: Whether it is quantized.
        times: A prediction for each number of tokens; empty without. Of a layer in high precision
            both times are that in bf16.
        note: Why it is in high precision, or why there is no prediction.
    """

    layer: str
    n: int
    k: int
    formats: str
    quantized: bool
    times: tuple[Prediction, ...]
    note: str = ""

    @property
    def slower(self) -> tuple[bool, ...]:
        """For each number of tokens, whether it is slower than in bf16."""
        return tuple(time.is_slower for time in self.times)


@dataclass(frozen=True)
class ExplainTable:
    """What is predicted of each layer that is a product.

    Attributes:
        gpu: On which GPU, a name in :data:`fpcompiler.runtime.costs.GPUS`.
        tokens: For which numbers of tokens.
        rows: One per layer, in the order of the program.
    """

    gpu: str
    tokens: tuple[int, ...]
    rows: tuple[ExplainRow, ...]

    @property
    def measured(self) -> bool:
        """Whether predictions rest on measured times; else they are estimates."""
        return self.gpu in MEASURED

    @property
    def totals(self) -> tuple[Prediction, ...]:
        """The sums of all layers that have a prediction, for each number of tokens."""
        with_times = [row.times for row in self.rows if row.times]
        return tuple(
            Prediction(
                sum(times[i].microseconds for times in with_times),
                sum(times[i].bf16_microseconds for times in with_times),
            )
            for i in range(len(self.tokens) if with_times else 0)
        )

    @property
    def legend(self) -> str:
        """What the numbers are, and on what they rest."""
        return (
            f"{self.gpu} ({TARGETS[self.gpu].machine}): microseconds of a layer, "
            f"{source_of(self.gpu)}; quantizing its input included. Layers that read the same "
            "quantized input are one product, and each shows its part. x: times as fast as a "
            f"product of bf16; slower: below {SLOWER}. What is between layers is not in it."
        )

    @property
    def summary(self) -> str:
        """One line: what all layers together are predicted to take."""
        how = "predicted" if self.measured else "estimated, never measured"
        sums = (
            f"M = {m:,}: {_time_text(total)}"
            for m, total in zip(self.tokens, self.totals, strict=False)
        )
        found = "; ".join(sums) or "no layer has a prediction"
        return f"layers on {self.gpu}, against bf16 ({how}): {found}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "gpu": self.gpu,
            "measured": self.measured,
            "legend": self.legend,
            "tokens": list(self.tokens),
            "rows": [_row_json(row, self.tokens) for row in self.rows],
            "totals": _times_json(self.totals, self.tokens),
        }

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        how = "predicted" if self.measured else "estimated, never measured:"
        title = Text(f"{how} times on {self.gpu}")
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
        table.add_column("layer", "all of these", overflow="fold", min_width=9)
        table.add_column("N x K", no_wrap=True)
        table.add_column("formats", overflow="fold", min_width=8)
        totals = self.totals or (None,) * len(self.tokens)
        for tokens, total in zip(self.tokens, totals, strict=True):
            table.add_column(
                f"M = {tokens:,}", _cell(total, quantized=True), justify="right", no_wrap=True
            )
        table.add_column("note", overflow="fold", min_width=6)
        for row in self.rows:
            cells = [_cell(time, row.quantized) for time in row.times]
            cells += [Text("-")] * (len(self.tokens) - len(cells))
            texts = row.layer, f"{row.n} x {row.k}", row.formats
            style = None if row.quantized else "dim"
            table.add_row(*map(Text, texts), *cells, Text(row.note), style=style)
        table.caption = Text(self.legend)
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.__rich__())


def explain(
    artifact: Artifact, gpu: str | None = None, tokens: Sequence[int] = TOKENS
) -> ExplainTable:
    """Return what is predicted of the layers of an artifact.

    Args:
        artifact: The compiled model.
        gpu: On which GPU; by default the first that the model was compiled for.
        tokens: For which numbers of tokens: rows of activations, all of a batch.

    Raises:
        OptionError: If there are no predictions for such a GPU, or a number is none.
    """
    found = _gpu_of(artifact, gpu)
    if not tokens or not all(type(m) is int and m > 0 for m in tokens):
        raise OptionError(f"tokens={tokens!r} must be numbers of at least 1, such as (1, 2048).")
    reasons = _reasons(artifact, found)
    together = _together(artifact.plan)
    rows = (
        _row(row, found, tuple(tokens), together.get(row.name, ()), reasons.get(row.name, ""))
        for row in artifact.plan.layers
    )
    return ExplainTable(found, tuple(tokens), tuple(row for row in rows if row is not None))


def _gpu_of(artifact: Artifact, gpu: str | None) -> str:
    if gpu is None:
        compiled = [name for name in artifact.targets if name in GPUS]
        if not compiled:
            raise OptionError(
                f"the model was compiled for {', '.join(artifact.targets)}: say for which GPU "
                f"times are wanted, such as {GPUS[0]!r}. There are some for {', '.join(GPUS)}."
            )
        return compiled[0]
    if gpu not in GPUS:
        raise OptionError(f"there are no times for {gpu!r}; for {', '.join(GPUS)} there are.")
    return gpu


def _reasons(artifact: Artifact, gpu: str) -> dict[str, str]:
    """Return why layers have no kernel, where the artifact has kernels for the GPU."""
    target = KernelIndex.of(artifact.kernels).targets.get(gpu)
    layers = target.layers if target else {}
    return {name: layer.reason for name, layer in layers.items() if layer.reason}


def _together(plan: Plan) -> Mapping[str, tuple[int, ...]]:
    """Return the outputs of each layer that a GPU multiplies with a layer as one, by its name.

    They are those of :func:`fpcompiler.runtime.cuda.joined.joinable`.
    """
    sizes = {row.name: row.shape[0] for row in plan.layers if row.quantized}
    steps = [step for step in plan.steps if step.op == LINEAR_STEP and step.layer in sizes]
    groups: dict[object, tuple[int, ...]] = {}
    for step in steps:
        group = _joined_by(step, plan)
        groups[group] = (*groups.get(group, ()), sizes[step.layer])
    return {step.layer: groups[_joined_by(step, plan)] for step in steps}


def _joined_by(step: Step, plan: Plan) -> object:
    given = arguments_of(step)
    if given is None or given.activation or step.outs[0] in plan.outputs:
        return step.outs
    operands = given.x_operand, given.w_operand, given.bias is None
    return str(given.x), operands, str(given.dtype)


def _row(
    row: LayerRow, gpu: str, tokens: tuple[int, ...], together: tuple[int, ...], reason: str
) -> ExplainRow | None:
    if row.op not in _PRODUCTS:
        return _unpredicted(row, "a convolution is not one product") if row.quantized else None
    n, k = row.shape[:2]
    if not row.quantized:
        n, k = (k, n) if row.op in _TRANSPOSED else (n, k)
        plain = (bf16_microseconds(gpu, m, n, k) for m in tokens)
        times = tuple(Prediction(time, time) for time in plain)
        return ExplainRow(row.name, n, k, row.weight, False, times, row.reason)
    if reason:
        return _unpredicted(row, f"no kernel, runs as the reference: {reason}")
    weight = Operand.parse(row.weight)
    activation = Operand.parse(row.activation) if "@" in row.activation else None
    found = [predict(gpu, LayerCall(m, n, k, weight, activation, together)) for m in tokens]
    times = tuple(time for time in found if not isinstance(time, str))
    note = next((text for text in found if isinstance(text, str)), "")
    slow = [f"{m:,}" for m, time in zip(tokens, times, strict=False) if time.is_slower]
    note = note or (f"slower than bf16 with M = {', '.join(slow)}" if slow else "")
    return ExplainRow(row.name, n, k, _formats(row), True, times, note)


def _unpredicted(row: LayerRow, note: str) -> ExplainRow:
    return ExplainRow(row.name, row.shape[0], row.shape[1], _formats(row), True, (), note)


def _formats(row: LayerRow) -> str:
    return f"{row.weight} by {row.activation}"


def _cell(time: Prediction | None, quantized: bool) -> Text:
    if time is None:
        return Text("-")
    if not quantized:
        return Text(_duration(time.microseconds))
    return Text(_time_text(time), style="red" if time.is_slower else "")


def _time_text(time: Prediction) -> str:
    return f"{_duration(time.microseconds)} {time.speed:.2f}x"


def _duration(microseconds: float) -> str:
    return f"{microseconds:,.{1 if microseconds >= 1 else 2}f} us"


def _row_json(row: ExplainRow, tokens: tuple[int, ...]) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "n": row.n,
        "k": row.k,
        "formats": row.formats,
        "quantized": row.quantized,
        "times": _times_json(row.times, tokens),
        "note": row.note,
    }


def _times_json(times: tuple[Prediction, ...], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {
            "tokens": m,
            "microseconds": time.microseconds,
            "bf16_microseconds": time.bf16_microseconds,
            "speed": time.speed,
            "slower": time.is_slower,
        }
        for m, time in zip(tokens, times, strict=False)
    ]
