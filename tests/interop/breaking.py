"""Ways to break the checkpoints of :mod:`tests.interop.folders`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpcompiler.numerics.kernel_layout import swizzle_scales
from tests.interop.folders import WEIGHTS, edit_config, edit_group, edit_json, edit_tensors

Q = "model.q_proj"
PACKED, SCALE, PLAIN, BIAS = (
    f"{Q}.{n}" for n in ("weight_packed", "weight_scale", "weight", "bias")
)
GLOBAL, INPUT, SECOND = (
    f"{Q}.{name}" for name in ("weight_global_scale", "input_global_scale", "weight_scale_2")
)
WEIGHT = f"{PLAIN}'"
CONFIG, MODELOPT, GROUP = "config.json", "hf_quant_config.json", "'group_0'"
F8 = torch.float8_e4m3fn

Edit = Callable[[Path], None]


def drop(name: str) -> Edit:
    return edit_tensors(lambda tensors: tensors.__delitem__(name))


def put(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def add(name: str, tensor: Tensor) -> Edit:
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


def as_bytes(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: change(tensor.view(torch.uint8)).view(tensor.dtype)


def filled(value: int) -> Callable[[Tensor], Tensor]:
    """Set one byte in the middle."""

    def change(tensor: Tensor) -> Tensor:
        tensor[5, 1] = value
        return tensor

    return as_bytes(change)


def integers(codes: Tensor) -> Tensor:
    """Return two's complement integers of 4 bits in place of E2M1."""
    values = torch.randn(codes.numel() * 2, generator=torch.Generator().manual_seed(1)) * 2.5
    nibbles = values.round().clamp(-8, 7).to(torch.int16) & 15
    return (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8).view(codes.shape)


def swizzled_kernel_order(scale: Tensor) -> Tensor:
    return swizzle_scales(scale.view(torch.uint8)).view(scale.shape).view(scale.dtype)


@edit_tensors
def interleave(tensors: dict[str, Tensor]) -> None:
    order = torch.arange(128).view(2, 64).T.flatten()
    for name in (PACKED, SCALE):
        tensors[name] = tensors[name].view(torch.uint8)[order].view(tensors[name].dtype)


def cut_file(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def two_files(folder: Path, lie: str = "") -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    names, parts = sorted(tensors), ("a.safetensors", "b.safetensors")
    split = {name: parts[number % 2] for number, name in enumerate(names)}
    for part in parts:
        save_file({n: tensors[n] for n in names if split[n] == part}, folder / part)
    if lie == "moved":
        split[names[0]] = parts[1]
    if lie == "missing":
        (folder / parts[1]).unlink()
    if lie == "unlisted":
        del split[names[1]]
    if lie == "outside":
        split[names[0]] = "../a.safetensors"
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": split}))


def rewrite(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text) and None


def weights(**values: Any) -> Edit:
    return edit_group("weights", **values)


def inputs(**values: Any) -> Edit:
    return edit_group("input_activations", **values)


def modelopt(**values: Any) -> Edit:
    return edit_json(lambda c: c["quantization"].update(values), MODELOPT)


def swapped(tensor: Tensor) -> Tensor:
    return tensor << 4 | tensor >> 4


def config(**values: Any) -> Edit:
    return edit_config(lambda data: data.update(values))


def targets(*names: str) -> Edit:
    return edit_config(lambda data: data["config_groups"]["group_0"].update(targets=list(names)))
