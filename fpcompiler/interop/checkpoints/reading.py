"""Reading a quantized checkpoint: every tensor accounted for, every contradiction refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.arguments import PATH, require_type
from fpcompiler.errors import CheckpointError, FormatError
from fpcompiler.interop.checkpoints import plausibility, structure
from fpcompiler.interop.checkpoints.config import (
    Group,
    QuantizationConfig,
    names_layer,
    read_config,
)
from fpcompiler.interop.checkpoints.files import Kind, Tensors, read_json
from fpcompiler.interop.checkpoints.layouts import PARAMETERS, same_values
from fpcompiler.interop.checkpoints.stored import StoredLayer, direct
from fpcompiler.operand import Operand

RECORD: Final = "fpcompiler.json"
"""A file of ours beside the tensors: their checksums, and what a config of others cannot say."""

RECORD_VERSION: Final = 1

_MODELOPT_MARK: Final = "weight_scale_2"
_CACHE: Final = ("k_scale", "v_scale", "q_scale")


@dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint.

    Attributes:
        folder: Where it is.
        config: What its config says.
        layers: The quantized layers by name.
        tensors: All tensors of the folder.
        plain: Names of the tensors that are no part of a quantized weight.
        record: Our own record beside it; empty if another program wrote the folder.
        notes: What is in the folder and has no counterpart here.
    """

    folder: Path
    config: QuantizationConfig
    layers: Mapping[str, StoredLayer]
    tensors: Tensors
    plain: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(folder: str | os.PathLike[str], *, check_values: bool = True) -> Checkpoint:
    """Read a compressed-tensors or ModelOpt checkpoint; its weights are held as they are stored.

    Args:
        folder: With ``config.json`` and safetensors files.
        check_values: Whether weights are refused that no model has, see
            :mod:`fpcompiler.interop.checkpoints.plausibility`.

    Raises:
        CheckpointError: If the folder is damaged, contradicts itself, or is of a format that cannot
            be read without loss. The message names the tensor and the cause.
        OptionError: If the folder is no path.
    """
    require_type("the checkpoint", folder, PATH, "the path of a folder")
    reader = _Reader(Path(folder))
    layers = {name: reader.layer(name) for name in reader.names}
    reader.require_plain()
    reader.require_fulfilled(layers)
    if check_values:
        for layer, name, why in plausibility.suspicions(list(layers.values())):
            raise reader.error(
                f"{layer}.{name}", f"{why}. If it is right all the same: --no-check-values"
            )
    plain = tuple(name for name in reader.tensors if name not in reader.used)
    return Checkpoint(
        reader.folder, reader.config, layers, reader.tensors, plain, reader.record, reader.notes
    )


class _Reader:
    """One folder while it is read."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder.")
        self.folder = folder
        self.config = read_config(folder)
        self.tensors = Tensors(folder)
        self.record = _read_record(folder)
        self.used: set[str] = set()
        self.names = sorted({*self._quantized()})
        cache = [name for name in self.tensors if name.rpartition(".")[2] in _CACHE]
        self.used.update(cache)
        note = "scales of the KV cache in the folder are left out"
        self.notes = (*self.config.notes, *([note] if cache else []))
        if not self.names:
            raise CheckpointError(
                f"{folder}: the config says that layers are quantized, but no tensor holds codes."
            )

    def error(self, tensor: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: tensor {tensor!r}: {why}.")

    def _quantized(self) -> Iterator[str]:
        """Yield the layers that have codes."""
        for name, kind in self.tensors.kinds.items():
            layer, _, parameter = name.rpartition(".")
            if (
                parameter == "weight_packed"
                or f"{layer}.{_MODELOPT_MARK}" in self.tensors
                or (parameter == "weight" and kind.dtype in ("U8", "F8_E4M3"))
            ):
                yield layer

    def layer(self, name: str) -> StoredLayer:
        """Read and check one layer."""
        group = self._group(name)
        kinds = self._kinds(name, group)
        for tensor, why in structure.kind_problems(group.layout, kinds):
            raise self.error(f"{name}.{tensor}", why)
        layout = group.layout
        parts = {part: self._read(f"{name}.{part}") for part in kinds}
        codes, scale = (
            structure.as_bytes(parts[layout.codes]),
            structure.as_bytes(parts["weight_scale"]),
        )
        numbers = {
            part: parts[part] for part in (layout.outer, layout.input_outer) if part in parts
        }
        for tensor, why in structure.value_problems(layout, codes, scale, numbers):
            raise self.error(f"{name}.{tensor}", why)
        if layout.scale_dtype == "F8_E4M3":
            # What is left of zeros are blocks of zeros: any scale gives their values.
            scale = scale.clamp(min=1)
        outer = direct(numbers[layout.outer], layout) if layout.outer else None
        input_outer = numbers.get(layout.input_outer)
        return StoredLayer(
            name,
            layout,
            self._operand(name, group),
            codes,
            scale,
            outer,
            group.input,
            None if input_outer is None else direct(input_outer, layout),
            numbers,
        )

    def _group(self, name: str) -> Group:
        if self.config.ignores(name):
            raise self.error(
                f"{name}.weight", "it holds codes, but the config lists the layer as not quantized"
            )
        group = self.config.group_of(name)
        if group is None:
            raise self.error(
                f"{name}.weight", "it holds codes, but no group of the config names it"
            )
        return group

    def _kinds(self, name: str, group: Group) -> dict[str, Kind]:
        """Return the tensors of a layer by their names within it: all that it has, and no other."""
        layout = group.layout
        is_static = group.input is not None and group.input.is_static
        expected = layout.tensors(is_static)
        for part in expected:
            if f"{name}.{part}" not in self.tensors:
                raise self.error(f"{name}.{part}", f"it is missing; {self._need(part, group)}")
        # A static scale of an input that is not quantized says nothing: files have some left over.
        self.used.update(f"{name}.{part}" for part in (*expected, layout.input_outer) if part)
        for part in (*PARAMETERS, "weight"):
            full = f"{name}.{part}"
            if full in self.tensors and full not in self.used and part not in _CACHE:
                raise self.error(full, f"{layout.name} has no such tensor beside {layout.codes}")
        return {part: self.tensors.kinds[f"{name}.{part}"] for part in expected}

    def _need(self, part: str, group: Group) -> str:
        if part == group.layout.input_outer:
            return "without it readers take what happens to be in memory for the scale of the input"
        if part == group.layout.codes:
            return f"the layer has other tensors of a quantized weight ({group.layout.name})"
        return f"{group.layout.name} weights cannot be read without it"

    def _read(self, name: str) -> Tensor:
        tensor = self.tensors.read(name)
        expected = self.record.get("sha256", {}).get(name)
        if expected is not None and checksum(tensor) != expected:
            raise self.error(
                name,
                f"its checksum is not the one in {RECORD}: it was changed after it was written",
            )
        return tensor

    def _operand(self, name: str, group: Group) -> Operand:
        """Return what our record says of a weight, or what its format does."""
        text = self.record.get("weights", {}).get(name)
        if text is None:
            return group.layout.operand
        try:
            operand = Operand.parse(str(text))
        except FormatError as error:
            raise CheckpointError(f"{self.folder / RECORD}: layer {name!r}: {error}") from error
        if not same_values(operand, group.layout.operand):
            raise CheckpointError(
                f"{self.folder / RECORD}: layer {name!r}: {operand} is not what "
                f"{group.layout.name} holds."
            )
        return operand

    def require_plain(self) -> None:
        """Check that what is left are ordinary tensors, all of them finite."""
        for name, kind in self.tensors.kinds.items():
            layer, _, part = name.rpartition(".")
            if name in self.used:
                continue
            if part in PARAMETERS:
                raise self.error(
                    name, f"there are no codes of a weight in {layer!r} that it is for"
                )
            if kind.dtype in ("F32", "F16", "BF16", "F64"):
                self._require_finite(name, layer, part)

    def _require_finite(self, name: str, layer: str, part: str) -> None:
        tensor = self.tensors.read(name)
        if not bool(tensor.isfinite().all()):
            raise self.error(name, "it holds NaN or infinity")
        if part == "bias" and layer in self.names:
            rows = self.tensors.kinds[f"{layer}.weight_scale"].shape[0]
            if tensor.shape != (rows,):
                raise self.error(name, f"it is {list(tensor.shape)} for a weight of {rows} rows")

    def require_fulfilled(self, layers: Mapping[str, StoredLayer]) -> None:
        """Check that the config promises no layer that is not there."""
        for group in self.config.groups:
            for target in group.targets:
                self._require_target(group, target, layers)

    def _require_target(self, group: Group, target: str, layers: Mapping[str, StoredLayer]) -> None:
        is_name = not target.startswith("re:") and f"{target}.weight" in self.tensors
        if is_name and target not in layers and not self.config.ignores(target):
            raise self.error(
                f"{target}.weight",
                f"the config says it is quantized ({group.layout.name}), but it is a plain weight",
            )
        of_class = not target.startswith("re:") and "." not in target
        found = of_class or any(names_layer(target, name) for name in layers)
        if not found and not self.config.ignores(target):
            raise CheckpointError(
                f"{self.config.source}: the target {target!r} of group {group.name!r} matches no "
                "quantized layer of the folder: the config belongs to another checkpoint, or "
                f"{target}.{group.layout.codes} is missing."
            )


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    if record.get("version") != RECORD_VERSION:
        raise CheckpointError(
            f"{path}: it has version {record.get('version')!r}; this fpcompiler reads "
            f"{RECORD_VERSION}. Install the version that wrote it, or delete the file: then "
            "nothing is checked against it."
        )
    for key in ("sha256", "weights", "inputs"):
        if not isinstance(record.get(key), dict):
            raise CheckpointError(f"{path}: {key} is missing or no JSON object.")
    return record


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
