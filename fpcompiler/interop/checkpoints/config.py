"""Which layers a config says are quantized, and how: compressed-tensors' and ModelOpt's."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fpcompiler.errors import CheckpointError
from fpcompiler.interop.checkpoints.arguments import (
    INPUTS,
    InputKind,
    mismatch_of_weight,
    parse_input,
)
from fpcompiler.interop.checkpoints.files import CONFIG, read_json
from fpcompiler.interop.checkpoints.layouts import COMPRESSED, MODELOPT, Layout

MODELOPT_CONFIG: Final = "hf_quant_config.json"
COMPRESSED_TENSORS: Final = "compressed-tensors"

_MIXED: Final = "mixed-precision"
_LAYOUTS: Final = {row.name: row for row in COMPRESSED}


@dataclass(frozen=True)
class Group:
    """Layers that are quantized alike.

    Attributes:
        name: Of the group, for errors.
        targets: Names of layers, ``re:`` and regular expressions, or names of module classes.
        layout: How weights are stored.
        input: What inputs are quantized to; None: nothing.
    """

    name: str
    targets: tuple[str, ...]
    layout: Layout
    input: InputKind | None

    def names(self, layer: str) -> bool:
        """Return whether a target names the layer, alone or by a regular expression."""
        return any(names_layer(target, layer) for target in self.targets)


@dataclass(frozen=True)
class QuantizationConfig:
    """What a config says.

    Attributes:
        source: The file, for errors.
        method: ``compressed-tensors`` or ``modelopt``.
        groups: In order.
        ignore: Patterns of layers that are not quantized.
        matches: Whether such a pattern matches a layer.
        notes: What it asks for that has no part in the weights, such as a quantized KV cache.
    """

    source: Path
    method: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    matches: Callable[[str, str], bool]
    notes: tuple[str, ...] = ()

    def ignores(self, layer: str) -> bool:
        """Return whether a layer is on the list of those that are left alone."""
        return any(self.matches(pattern, layer) for pattern in self.ignore)

    def group_of(self, layer: str, module_class: str = "Linear") -> Group | None:
        """Return the group of a layer: the first that names it, or else its class."""
        if self.ignores(layer):
            return None
        named = (group for group in self.groups if group.names(layer))
        of_class = (group for group in self.groups if module_class in group.targets)
        return next(named, None) or next(of_class, None)


def read_config(folder: Path) -> QuantizationConfig:
    """Return what the configs of a folder say.

    Raises:
        CheckpointError: If there is none, or it describes something that cannot be read without
            loss; the message says what.
    """
    path = folder / CONFIG
    config = read_json(path).get("quantization_config")
    if config is None and (folder / MODELOPT_CONFIG).is_file():
        path = folder / MODELOPT_CONFIG
        config = _modelopt_section(path)
    if config is None:
        raise CheckpointError(
            f"{path}: it has no quantization_config, so the model is not quantized. Compile it: "
            "fpcompiler compile FOLDER."
        )
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: quantization_config is no JSON object.")
    method = config.get("quant_method", "modelopt" if "quant_algo" in config else None)
    readers = {COMPRESSED_TENSORS: _compressed_tensors, "modelopt": _modelopt}
    if method not in readers:
        raise CheckpointError(
            f"{path}: quant_method is {method!r}; only compressed-tensors and modelopt are read."
        )
    return readers[method](path, config)


def _modelopt_section(path: Path) -> dict[str, Any] | None:
    section = read_json(path).get("quantization")
    return {**section, "quant_method": "modelopt"} if isinstance(section, dict) else None


def _compressed_tensors(path: Path, config: Mapping[str, Any]) -> QuantizationConfig:
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise CheckpointError(
            f"{path}: quantization_status is {status!r}, so the weights are not stored as codes. "
            "Save the model compressed (save_compressed=True of llm-compressor)."
        )
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            raise CheckpointError(
                f"{path}: it has a {key}, which changes what the layers compute; such checkpoints "
                "cannot be read."
            )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{path}: config_groups names no group of quantized layers.")
    found = tuple(_group(path, name, group, config.get("format")) for name, group in groups.items())
    ignore = _texts(path, "ignore", config.get("ignore") or [])
    notes = _cache_note(config.get("kv_cache_scheme"))
    return QuantizationConfig(path, COMPRESSED_TENSORS, found, ignore, names_layer, notes)


def _group(path: Path, name: str, group: Any, whole: Any) -> Group:
    where = f"{path}: group {name!r}"
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where} does not say how its weights are quantized.")
    if group.get("output_activations"):
        raise CheckpointError(f"{where} quantizes outputs of layers, which cannot be read.")
    own = group.get("format") or whole
    if own == _MIXED or own is None:
        raise CheckpointError(f"{where} has no format, and quantization_config names none for all.")
    if whole not in (own, None, _MIXED):
        raise CheckpointError(
            f"{where} has the format {own!r}, but the format of all is {whole!r}."
        )
    layout = _LAYOUTS.get(str(own))
    if layout is None:
        raise CheckpointError(
            f"{where} has the format {own!r}; those that are read: {', '.join(_LAYOUTS)}."
        )
    problem = mismatch_of_weight(group["weights"], layout)
    if problem:
        raise CheckpointError(f"{where}: {problem}.")
    targets = _texts(path, f"targets of {name!r}", group.get("targets"))
    if not targets:
        raise CheckpointError(f"{where} has no targets.")
    return Group(name, targets, layout, _input(where, group.get("input_activations")))


def _input(where: str, arguments: Any) -> InputKind | None:
    if arguments is None:
        return None
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where}: input_activations is no JSON object.")
    found = parse_input(arguments)
    if isinstance(found, str):
        raise CheckpointError(f"{where}: its input_activations cannot be read: {found}.")
    return found


def _modelopt(path: Path, config: Mapping[str, Any]) -> QuantizationConfig:
    algorithm = str(config.get("quant_algo"))
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{path}: quant_algo is {algorithm!r}; those that are read: {', '.join(_ALGORITHMS)}."
        )
    size = config.get("group_size", _weights_of_groups(config).get("group_size"))
    if size not in (None, MODELOPT.block.block):
        raise CheckpointError(
            f"{path}: group_size is {size!r}, but {algorithm} has blocks of {MODELOPT.block.block}."
        )
    excluded = config.get("exclude_modules", config.get("ignore")) or []
    group = Group(algorithm, ("Linear",), MODELOPT, _ALGORITHMS[algorithm])
    ignore = _texts(path, "exclude_modules", excluded)
    cache = config.get("kv_cache_quant_algo", config.get("kv_cache_scheme"))
    return QuantizationConfig(path, "modelopt", (group,), ignore, _globs, _cache_note(cache))


_ALGORITHMS: Final[Mapping[str, InputKind | None]] = {"NVFP4": INPUTS[0], "W4A16_NVFP4": None}
"""What inputs are quantized to, by ModelOpt's name of the algorithm."""


def _weights_of_groups(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how weights are quantized where ModelOpt writes groups as compressed-tensors does."""
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _cache_note(scheme: Any) -> tuple[str, ...]:
    if not scheme:
        return ()
    return ("the config quantizes the KV cache; keys and values stay in high precision here",)


def _texts(path: Path, what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{path}: {what} is no list of names.")
    for item in value:
        _check_regex(path, what, item)
    return tuple(value)


def _check_regex(path: Path, what: str, pattern: str) -> None:
    if not pattern.startswith("re:"):
        return
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise CheckpointError(
            f"{path}: {what} has {pattern!r}, which is no regular expression: {error}."
        ) from error


def names_layer(pattern: str, layer: str) -> bool:
    """Return whether a pattern of compressed-tensors names a layer.

    It is the whole name, or ``re:`` and a regular expression for the beginning of it.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return pattern == layer


def _globs(pattern: str, layer: str) -> bool:
    """Match as ModelOpt does: a glob for the name, or for that of a module around it."""
    if pattern.startswith("re:"):
        return names_layer(pattern, layer)
    parts = layer.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(name, pattern) for name in around)
