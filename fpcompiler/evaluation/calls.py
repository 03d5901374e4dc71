"""Calls of the model under evaluation: where it runs, which output is meant, what went wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fpcompiler.errors import FpcompilerError, OptionError, RunError
from fpcompiler.evaluation.base import Model, Program
from fpcompiler.tree import describe

_MODEL_ERRORS: Final = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a model's own code raises when its inputs do not fit."""

NAN_HINT: Final = "CompiledModel.compare shows the error of each layer, and where NaN begins."
"""The next step after an output that is not finite."""


def one_program(model: Model) -> Program:
    """Return the model as one program.

    Raises:
        OptionError: If it consists of several.
    """
    if isinstance(model, tuple):
        raise OptionError(f"this task needs one program, not a model of {len(model)} parts.")
    return model


def device_of(program: Program) -> torch.device | None:
    """Return where a program runs; None, which leaves data where they are, if nothing tells."""
    if isinstance(program, nn.Module):
        tensors = itertools.chain(program.parameters(), program.buffers())
        return next((tensor.device for tensor in tensors), None)
    device = getattr(program, "device", None)
    return device if isinstance(device, torch.device) else None


def call(program: Program, *args: Any, **kwargs: Any) -> Any:
    """Call a program without gradients.

    Raises:
        RunError: If it fails.
    """
    try:
        with torch.no_grad():
            return program(*args, **kwargs)
    except FpcompilerError:
        raise
    except _MODEL_ERRORS as error:
        shapes = ", ".join(_shape(value) for value in (*args, *kwargs.values()))
        raise RunError(
            f"{_name(program)} failed on inputs {shapes}: {type(error).__name__}: {error}"
        ) from error


def language_logits(program: Program, ids: Tensor) -> Tensor:
    """Return the logits [tokens, vocabulary] of a text [tokens], seen alone.

    The program is called with token ids [1, tokens].

    Raises:
        OptionError: If the result is not [1, tokens, vocabulary], or an id is outside of it.
        RunError: If the program fails.
    """
    largest = int(ids.max())  # Before the call: CUDA answers nothing after a wrong index.
    try:
        result = call(program, ids[None])
    except RunError as error:
        # Most often the embedding table is shorter than the vocabulary of the tokenizer.
        error.add_note(f"the token ids go up to {largest}: do they belong to this model?")
        raise
    if {"logits", "last_hidden_state"} & {*_entries(result)} == {"last_hidden_state"}:
        raise OptionError(
            f"{_name(program)} gives hidden states and no logits. Use the model with its head, "
            "which predicts tokens."
        )
    logits = select_output(result)
    if logits.ndim != 3 or logits.shape[:2] != (1, len(ids)):
        raise OptionError(
            f"{_name(program)} gives {list(logits.shape)} for token ids [1, {len(ids)}], but a "
            "language model gives [1, tokens, vocabulary]. Choose another task."
        )
    check_vocabulary(ids, logits.shape[-1])
    return logits[0]


def check_vocabulary(ids: Tensor, size: int) -> None:
    """Check that token ids are in a vocabulary.

    Raises:
        OptionError: If one is negative or not below ``size``.
    """
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise OptionError(
            f"the data hold the token id {wrong}, but the model's vocabulary has {size} entries. "
            "Use the tokenizer that belongs to the model."
        )


def select_output(result: Any, name: str | None = None) -> Tensor:
    """Return one tensor of what a program returned, without its gradients.

    Args:
        result: A tensor, a tuple, a mapping, or an object with attributes.
        name: The name or number of the entry; by default ``logits``, ``last_hidden_state``, or the
            first tensor, in this order.

    Raises:
        OptionError: If there is no such tensor.
    """
    if isinstance(result, Tensor) and name in (None, "0", "output"):
        return result.detach()
    entries = _entries(result)
    names = ("logits", "last_hidden_state", *entries) if name is None else (name,)
    for candidate in names:
        if isinstance(entries.get(candidate), Tensor):
            found: Tensor = entries[candidate]
            return found.detach()
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
    wanted = "tensor" if name is None else f"tensor {name!r}"
    raise OptionError(
        f"the model's result, {describe(result)}, has no {wanted}. Tensors in it: "
        f"{', '.join(tensors) or 'none'}."
    )


def _entries(result: Any) -> dict[str, Any]:
    if isinstance(result, Tensor):
        return {"0": result}
    if isinstance(result, Mapping):
        return {str(key): value for key, value in result.items()}
    if isinstance(result, tuple | list):
        return {str(index): value for index, value in enumerate(result)}
    return dict(getattr(result, "__dict__", {}))


def _name(program: Program) -> str:
    return getattr(program, "__name__", type(program).__name__)


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else describe(value)
