"""``fpcompiler eval``: how good a model still is, beside the original."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.command import OK, Command
from fpcompiler.cli.model import SUFFIXES, load_file
from fpcompiler.cli.output import print_json, print_table, progress
from fpcompiler.cli.source import load_source
from fpcompiler.cli.tasks import add_data_arguments, build_tasks
from fpcompiler.errors import FpcompilerError, OptionError

if TYPE_CHECKING:
    from fpcompiler.evaluation import Model, Recovery, Result, Task, Track

__all__ = ["COMMAND"]

_EXAMPLE: Final = """\
  fpcompiler eval model.fpc --against my_models:build --task perplexity \\
      --text book.txt --tokenizer tokenizer.json
  fpcompiler eval model.fpc --task choices --choices quiz.jsonl --tokenizer tokenizer.json
  fpcompiler eval model.fpc --task similarity --pairs pairs.tsv --tokenizer tokenizer.json
  fpcompiler eval vit.fpc --against my_models:vit --task agreement --inputs images.safetensors
  fpcompiler eval encoder.fpc,decoder.fpc --task wer --inputs features.safetensors \\
      --references texts.txt --tokenizer tokenizer.json \\
      --start '<|startoftranscript|>' '<|notimestamps|>' --end '<|endoftext|>'
  fpcompiler eval model.fpc --against my_models:build --task my_tasks:trivia

files: --choices has lines {"context": "...", "choices": ["...", "..."], "answer": 0};
--pairs has lines of two texts and a score, separated by tabs. A task function takes
nothing and returns a fpcompiler.evaluation.Task; examples/eval/tasks.py has some.

recovery is the value of MODEL divided by that of ORIGINAL. Where lower values are better
(perplexity, word error rate), a recovery above 1 is a loss."""


_TITLE: Final = "evaluation"
_HEADERS: Final = (
    "task", "metric", "better", "original", "model", "recovery", "change", "measured on",
)  # fmt: skip


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artifact, an ONNX file of `fpcompiler export`, or a SOURCE as for compile; the "
        "parts of a model with commas between",
    )
    parser.add_argument("--against", metavar="ORIGINAL", help="the model to compare with, likewise")
    add_data_arguments(parser)
    parser.add_argument("--device", default="cpu", help="by default cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    # Reading the data comes first: a mistake there should not cost the loading of a model.
    with progress("reading the data"):
        tasks = build_tasks(args)
    with progress("loading"):
        model = _load(args.model, args.device)
        original = _load(args.against, args.device) if args.against is not None else None
    rows = []
    with progress("evaluating") as track:
        for name, task in tasks.items():
            rows += _evaluate(name, task, model, original, track)
    if args.json:
        print_json({"model": args.model, "original": args.against, "rows": rows})
    else:
        _print(rows)
    return OK


@dataclass(frozen=True)
class _Named:
    """A model with the text that names it on the command line."""

    text: str
    model: Model

    def measure(self, name: str, task: Task, track: Track) -> Result:
        """Run a task; an error says of which task and model it is."""
        try:
            return task.run(
                self.model,
                lambda items, total, label: track(items, total, f"{self.text}: {label}"),
            )
        except FpcompilerError as error:
            error.add_note(f"in the task {name} with the model {self.text}")
            raise


def _load(text: str, device: str) -> _Named:
    """Return the model that a text names, ready to be evaluated on a device."""
    programs = tuple(_load_program(part, device) for part in text.split(","))
    return _Named(text, programs if len(programs) > 1 else programs[0])


def _load_program(text: str, device: str) -> Any:
    from torch import nn
    from torch.export import ExportedProgram

    from fpcompiler.runtime.devices import parse_device

    if text.endswith(SUFFIXES):
        return load_file(text, device)
    program = load_source(text, None).model
    if isinstance(program, ExportedProgram):
        return program.module().to(parse_device(device))
    if isinstance(program, nn.Module):
        return program.eval().to(parse_device(device))
    if not callable(program):
        raise OptionError(f"{text} gives {type(program).__name__}, which is no model.")
    return program


def _evaluate(
    name: str, task: Task, model: _Named, original: _Named | None, track: Track
) -> list[dict[str, Any]]:
    """Return a row for each metric of a task."""
    from fpcompiler.evaluation import recoveries

    if original is None:
        result = model.measure(name, task, track)
        return [_row(name, result, metric, value) for metric, value in result.metrics.items()]
    task = task.against(original.model)
    reference = original.measure(name, task, track)
    result = model.measure(name, task, track)
    return [
        _row(name, result, row.metric, row.compiled, row) for row in recoveries(reference, result)
    ]


def _row(
    name: str, result: Result, metric: str, value: float, recovery: Recovery | None = None
) -> dict[str, Any]:
    return {
        "task": name,
        "metric": metric,
        "better": result.direction.value,
        "original": recovery.original if recovery else None,
        "value": value,
        "recovery": recovery.ratio if recovery else None,
        "loss": recovery.loss if recovery else None,
        "count": result.count,
        "counted": result.counted,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    if rows[0]["original"] is None:
        print_table(_TITLE, ("task", "metric", "better", "value", "measured on"), [
            (_short(row["task"]), row["metric"], row["better"], row["value"], _measured_on(row))
            for row in rows
        ])  # fmt: skip
        return
    print_table(_TITLE, _HEADERS, [_cells(row) for row in rows])
    print("recovery = model / original; where lower is better, above 1 is a loss.")


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    recovery = "" if row["recovery"] is None else f"{row['recovery']:.4f}"
    return (
        _short(row["task"]), row["metric"], row["better"], row["original"], row["value"], recovery,
        _change(row["loss"]), _measured_on(row),
    )  # fmt: skip


def _short(task: str) -> str:
    return task.rpartition(":")[2]


def _change(loss: float | None) -> str:
    if loss is None:
        return "no ratio to this"
    if loss == 0:
        return "equal"
    return f"{abs(loss):.2%} {'worse' if loss > 0 else 'better'}"


def _measured_on(row: dict[str, Any]) -> str:
    return f"{row['count']} {row['counted']}"


COMMAND: Final = Command(
    "eval",
    "measure how good a model is, and how much of the original is left",
    _EXAMPLE,
    _add_arguments,
    _run,
)
