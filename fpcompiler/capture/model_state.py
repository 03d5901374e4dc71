"""Keeping the user's model as it is while it is traced."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put every attribute of every submodule back at the end, also after an error.

    Covers assigned attributes, the train/eval flag, registered parameters, buffers and hooks, and
    the contents of lists, dicts and sets held by a module. Tensor contents are not copied.
    """
    saved = [(module, _snapshot(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in saved:
            _restore(module, attributes)


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    attributes = module.__dict__.items()
    return {name: (value, _contents(value)) for name, value in attributes}


def _contents(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else None


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    module.__dict__.clear()
    for name, (value, contents) in attributes.items():
        module.__dict__[name] = value
        # What has not changed may be frozen, such as the config of a model of diffusers.
        if contents is None or _are_same(_elements(value), _elements(contents)):
            continue
        value.clear()
        if isinstance(value, list):
            value.extend(contents)
        else:
            value.update(contents)


def _elements(value: Any) -> list[Any]:
    return [*chain.from_iterable(value.items())] if isinstance(value, dict) else [*value]


def _are_same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


@contextlib.contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Put the contents of the model's buffers back at the end: its own code runs inside."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, contents in saved:
                buffer.copy_(contents)


def use_eval(model: nn.Module) -> str | None:
    """Switch to eval mode; return a note if that changes what the model computes.

    Sets the flags itself, because a model may override ``train`` to change its weights.
    """
    affected = {
        type(module).__name__
        for module in model.modules()
        if module.training
        and isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase)
    }
    for module in model.modules():
        module.training = False
    if not affected:
        return None
    kinds = ", ".join(sorted(affected))
    return f"the model was in training mode ({kinds}); it is captured in eval mode"


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, and drop what torch logs and prints about exports that fail.

    A failed export is tried again or becomes a :class:`CaptureError` that says the same better.
    """
    names = [*logging.root.manager.loggerDict]
    loggers = [logging.getLogger(name) for name in names if name.partition(".")[0] == "torch"]

    def harmless(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    silent = contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(record=True) as caught, silent:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addFilter(harmless)
        try:
            yield caught
        finally:
            for logger in loggers:
                logger.removeFilter(harmless)
