"""Where ``fpcompiler compile`` gets a model from."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpcompiler.cli.tensors import Inputs
from fpcompiler.errors import DependencyError, OptionError

__all__ = ["Source", "call_named", "load_source"]


@dataclass(frozen=True)
class Source:
    """A model (an ``nn.Module`` or an ``ExportedProgram``) and a call of it."""

    model: Any
    inputs: Inputs


def load_source(text: str, inputs: Inputs | None) -> Source:
    """Return the model that a text names.

    Args:
        text: A ``.pt2`` file of ``torch.export.save``, a local folder with a Hugging Face model, or
            ``package.module:function``, a function without arguments that returns a model and its
            example inputs (a tensor, a tuple of positional or a dict of keyword arguments).
        inputs: The call to capture, instead of the one that comes with the source.

    Raises:
        OptionError: If there is no such thing, or it is not a model.
        DependencyError: If transformers is needed and missing.
    """
    if text.endswith(".pt2"):
        return _from_archive(Path(text), inputs)
    if Path(text).is_dir():
        return _from_folder(Path(text), inputs)
    if ":" in text:
        return _from_function(text, inputs)
    raise OptionError(
        f"{text!r} is no source of a model: give a .pt2 file, a folder with config.json, or "
        "package.module:function."
    )


def _from_archive(path: Path, inputs: Inputs | None) -> Source:
    import torch

    if not path.is_file():
        raise OptionError(f"there is no file {path}.")
    if not zipfile.is_zipfile(path):
        raise OptionError(f"{path} is no archive of torch.export.save: it is not even a zip file.")
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise OptionError(f"{path} is no archive of torch.export.save: {error}") from error
    if inputs is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        inputs = Inputs(tuple(args), dict(kwargs))
    return Source(program, inputs or Inputs())


def _from_folder(path: Path, inputs: Inputs | None) -> Source:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise OptionError(f"{path} has no config.json, so it is no Hugging Face model.")
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "a Hugging Face folder needs transformers: pip install 'fpcompiler[models]'."
        ) from error
    architectures = json.loads(config_file.read_text(encoding="utf-8")).get("architectures")
    kind = getattr(transformers, architectures[0], None) if architectures else None
    if kind is None:
        raise OptionError(f"{config_file}: transformers has no architecture {architectures!r}.")
    from fpcompiler.huggingface import example_call, without_bars

    with without_bars():
        model = kind.from_pretrained(path, local_files_only=True).eval()
    return Source(model, inputs or Inputs((), example_call(model)))


def _from_function(text: str, inputs: Inputs | None) -> Source:
    result = call_named(text)
    if not isinstance(result, tuple) or len(result) != 2:
        raise OptionError(f"{text}() must return (model, example_inputs).")
    return Source(result[0], inputs or _as_inputs(result[1]))


def call_named(text: str) -> Any:
    """Return what the function ``package.module:function`` returns.

    Raises:
        OptionError: If there is no such function.
    """
    module_name, _, function_name = text.partition(":")
    # As with python -m: modules of the current folder can be named.
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ModuleNotFoundError as error:
        raise OptionError(f"{text}: there is no module {error.name!r}.") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise OptionError(f"{text}: the module {module_name} has no function {function_name!r}.")
    return function()


def _as_inputs(value: Any) -> Inputs:
    if isinstance(value, dict):
        return Inputs((), value)
    return Inputs(tuple(value) if isinstance(value, tuple | list) else (value,))
