"""The tasks of ``fpcompiler eval``: which there are, and the files their data come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.source import call_named
from fpcompiler.cli.tensors import read_inputs, read_tensors
from fpcompiler.cli.texts import (
    read_lines,
    read_text,
    read_tokenizer,
    token_id,
    without_limits,
)
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    import torch

    from fpcompiler.evaluation import Item, Task

__all__ = ["add_data_arguments", "build_tasks"]


@dataclass(frozen=True)
class _Kind:
    """A task with a name of its own.

    Attributes:
        build: Makes it from the arguments.
        needs: Options that it cannot do without.
        takes: Options that it can use beside them.
    """

    build: Callable[[argparse.Namespace], Task]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--task`` and the options that name its data."""
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        help=f"{', '.join(_KINDS)}, or package.module:function; may be given several times",
    )
    data = parser.add_argument_group("data")
    files = {
        "text": "perplexity: a text in UTF-8",
        "tokens": "perplexity, instead of a text: token ids as .safetensors or .npz",
        "choices": "choices: questions as JSON lines",
        "pairs": "similarity: text pairs and scores, with tabs between",
        "inputs": "agreement, features, wer: inputs as .safetensors or .npz, rows first",
        "references": "wer: what was said, one line for each clip",
        "tokenizer": "tokenizer.json of the model, as Hugging Face writes it",
    }
    for name, text in files.items():
        data.add_argument(f"--{name}", metavar="FILE", help=text)
    data.add_argument("--output", metavar="NAME", help="agreement, features: which output")
    data.add_argument("--start", metavar="TOKEN", nargs="+", help="first tokens, for instance <s>")
    data.add_argument("--end", metavar="TOKEN", help="wer: the token that ends a transcript")
    data.add_argument(
        "--window",
        metavar="N",
        type=_positive,
        help="tokens of a call at most: 512 for perplexity, 64 for wer",
    )
    data.add_argument("--batch-size", metavar="N", type=_positive, help="rows of a call: 8")
    data.add_argument(
        "--limit", metavar="N", type=_positive, help="only the first tokens, items, pairs or rows"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def build_tasks(args: argparse.Namespace) -> dict[str, Task]:
    """Return the tasks that the arguments name, with their data.

    An option that is missing, or that no task uses, is a wrong call and exits with 2.

    Raises:
        OptionError: If a file or function is missing or cannot be used.
        DependencyError: If a package is missing that reads the data.
    """
    used = {name for task in args.task for name in _options(args, task)}
    for name in _DATA_OPTIONS - used:
        if getattr(args, name) is not None:
            args.parser.error(f"{_flag(name)} is of no use for the task {', '.join(args.task)}")
    return {text: _build(args, text) for text in args.task}


def _options(args: argparse.Namespace, task: str) -> tuple[str, ...]:
    """Return the options that a task can use; a wrong call if one is missing that it needs."""
    if ":" in task:
        return ()
    if task not in _KINDS:
        names = ", ".join(_KINDS)
        args.parser.error(f"there is no task {task!r}: it is {names} or package.module:function")
    kind = _KINDS[task]
    needs = kind.needs
    if task == "perplexity" and args.tokens is not None:
        needs = ("tokens",)
    missing = [_flag(name) for name in needs if getattr(args, name) is None]
    if missing:
        args.parser.error(f"the task {task} needs {' and '.join(missing)}")
    return needs + kind.takes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _build(args: argparse.Namespace, text: str) -> Task:
    return _KINDS[text].build(args) if text in _KINDS else _named_task(text)


def _named_task(text: str) -> Task:
    """Return the task that a function returns."""
    from fpcompiler.evaluation import Task

    task = call_named(text)
    if not isinstance(task, Task):
        raise OptionError(
            f"{text}() returns {type(task).__name__}; it must return a fpcompiler.evaluation.Task."
        )
    return task


def _perplexity(args: argparse.Namespace) -> Task:
    import torch

    from fpcompiler.evaluation import Perplexity

    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.tokens:
        ids = _only_tensor(args.tokens)
        if ids.ndim == 2 and len(ids) == 1:  # as tokenizers return them
            ids = ids[0]
    else:
        encoding = without_limits(tokenizer).encode(read_text(args.text), add_special_tokens=False)
        ids = torch.tensor(encoding.ids)
    start = [token_id(tokenizer, token) for token in args.start or ()]
    if len(start) > 1:
        raise OptionError("perplexity takes one --start token.")
    return Perplexity(ids[: args.limit], args.window or 512, start[0] if start else None)


def _choices(args: argparse.Namespace) -> Task:
    from fpcompiler.evaluation import MultipleChoice

    tokenizer = without_limits(read_tokenizer(args.tokenizer))
    start = [token_id(tokenizer, token) for token in args.start or ()]
    items = []
    for where, line in read_lines(args.choices, args.limit):
        try:
            items.append(_item(tokenizer, start, json.loads(line)))
        except OptionError as error:
            error.add_note(f"in {where}")
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(
                f'{where} is not {{"context": "...", "choices": ["...", "..."], "answer": 0}}: '
                f"{type(error).__name__}: {error}"
            ) from error
    return MultipleChoice(tuple(items))


def _item(tokenizer: Any, start: list[int], data: Any) -> Item:
    import torch

    from fpcompiler.evaluation import Item

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    context = encode(data["context"])
    choices = []
    if not isinstance(data["choices"], list):
        raise TypeError("the choices are no list")
    for choice in data["choices"]:
        whole = encode(data["context"] + choice)
        # Where a token reaches over the border, the two texts are encoded apart.
        joined = whole[: len(context)] == context and len(whole) > len(context)
        choices.append(torch.tensor(whole[len(context) :] if joined else encode(choice)))
    return Item(torch.tensor(start + context), tuple(choices), int(data["answer"]))


def _similarity(args: argparse.Namespace) -> Task:
    import torch

    from fpcompiler.evaluation import Similarity

    tokenizer = read_tokenizer(args.tokenizer)
    tokenizer.no_padding()
    if args.window:
        tokenizer.enable_truncation(args.window)
    numbers: dict[str, int] = {}
    pairs, scores = [], []
    for where, line in read_lines(args.pairs, args.limit):
        *texts, score = line.split("\t")
        if len(texts) != 2:
            raise OptionError(f"{where} has {len(texts) + 1} columns, not two texts and a score.")
        pairs.append([numbers.setdefault(text, len(numbers)) for text in texts])
        try:
            scores.append(float(score))
        except ValueError:
            raise OptionError(f"{where}: the score {score!r} is not a number.") from None
    ids = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(numbers))]
    batches, order = _equal_lengths(ids, args.batch_size or 8)
    position = {text: index for index, text in enumerate(order)}
    moved = [[position[text] for text in pair] for pair in pairs]
    return Similarity(batches, torch.tensor(moved).reshape(-1, 2), torch.tensor(scores))


def _equal_lengths(
    texts: Sequence[torch.Tensor], size: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
    """Return batches of texts of one length each, and the numbers of the texts in their order.

    Without padding no vector depends on how long the other texts of its batch are.
    """
    import torch

    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    groups: list[list[int]] = []
    for index in order:
        last = groups[-1] if groups else []
        if last and len(last) < size and len(texts[last[0]]) == len(texts[index]):
            last.append(index)
        else:
            groups.append([index])
    stacked = (torch.stack([texts[index] for index in group]) for group in groups)
    return [(ids, torch.ones_like(ids)) for ids in stacked], order


def _agreement(args: argparse.Namespace) -> Task:
    from fpcompiler.evaluation import Agreement

    return Agreement(_batches(args), args.output)


def _features(args: argparse.Namespace) -> Task:
    from fpcompiler.evaluation import FeatureAgreement

    return FeatureAgreement(_batches(args), args.output)


def _batches(args: argparse.Namespace) -> list[Any]:
    """Return the calls of ``--inputs``, a few rows each."""
    import torch

    inputs = read_inputs(args.inputs)
    tensors: dict[Any, torch.Tensor] = dict(inputs.kwargs)
    tensors.update(enumerate(inputs.args))
    if not tensors or (inputs.args and inputs.kwargs):
        raise OptionError(f"{args.inputs}: name all tensors after arguments, or number them all.")
    rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(rows) > 1 or 0 in rows:
        raise OptionError(
            f"{args.inputs}: the first dimension of each tensor counts the rows, so it must be "
            f"the same and not 0; found {sorted(rows)}."
        )
    size = args.batch_size or 8
    cut = {name: torch.split(tensor[: args.limit], size) for name, tensor in tensors.items()}
    calls = [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]
    return [tuple(each.values()) for each in calls] if inputs.args else calls


def _wer(args: argparse.Namespace) -> Task:
    import torch

    from fpcompiler.evaluation import Transcription

    tokenizer = read_tokenizer(args.tokenizer)
    end = token_id(tokenizer, args.end)
    added = set(tokenizer.get_added_tokens_decoder()) - {end}
    clips = _only_tensor(args.inputs)[: args.limit]
    return Transcription(
        clips=torch.split(clips, 1),
        references=[line for _, line in read_lines(args.references, args.limit)],
        start=torch.tensor([token_id(tokenizer, token) for token in args.start]),
        end=end,
        to_text=tokenizer.decode,
        suppressed=torch.tensor(sorted(added), dtype=torch.int64),
        longest=args.window or 64,
    )


def _only_tensor(file: str) -> torch.Tensor:
    tensors = read_tensors(file)
    if len(tensors) != 1:
        raise OptionError(f"{file} must hold one tensor; it holds {', '.join(tensors) or 'none'}.")
    return next(iter(tensors.values()))


_KINDS: Final = {
    "perplexity": _Kind(
        _perplexity, ("text", "tokenizer"), ("tokenizer", "start", "window", "limit")
    ),
    "choices": _Kind(_choices, ("choices", "tokenizer"), ("start", "limit")),
    "similarity": _Kind(
        _similarity, ("pairs", "tokenizer"), ("window", "batch_size", "limit")
    ),
    "agreement": _Kind(_agreement, ("inputs",), ("output", "batch_size", "limit")),
    "features": _Kind(_features, ("inputs",), ("output", "batch_size", "limit")),
    "wer": _Kind(_wer, ("inputs", "references", "tokenizer", "start", "end"), ("window", "limit")),
}  # fmt: skip
_DATA_OPTIONS: Final = frozenset(
    name for kind in _KINDS.values() for name in (*kind.needs, *kind.takes)
) | {"tokens"}
