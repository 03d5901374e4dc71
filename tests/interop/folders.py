"""Small quantized checkpoints, whole, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpcompiler import numerics
from fpcompiler.interop.checkpoints.arguments import INPUTS, input_arguments, weight_arguments
from fpcompiler.interop.checkpoints.layouts import COMPRESSED, MODELOPT, Layout
from fpcompiler.numerics.given import power_of_two

DATA = Path(__file__).parent / "data"
LAYERS = ("model.q_proj", "model.k_proj")
N, K = 128, 128
WEIGHTS = "model.safetensors"

LAYOUTS: Mapping[str, Layout] = {
    **{row.name.partition("-")[0]: row for row in COMPRESSED},
    "modelopt": MODELOPT,
}
_DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


def original(layer: str) -> Tensor:
    """Return the weight [128, 128] of a layer: rows differ in size, as in trained models."""
    generator = torch.Generator().manual_seed(LAYERS.index(layer))
    rows = torch.empty(N, 1).uniform_(-2, 2, generator=generator).exp2()
    return rows * torch.randn(N, K, generator=generator) / K**0.5


def write_original(folder: Path) -> Path:
    """Write the model before it was quantized."""
    folder.mkdir()
    save_file({f"{layer}.weight": original(layer) for layer in LAYERS}, folder / WEIGHTS)
    return folder


def quantized(layer: str, layout: Layout, is_static: bool) -> dict[str, Tensor]:
    """Return the tensors of a layer in a format, by name."""
    weight = original(layer)
    codes, scales = numerics.quantize_packed(weight, layout.operand)
    parts = {
        layout.codes: codes.view(_DTYPES[layout.codes_dtype]),
        "weight_scale": scales[-1].view(_DTYPES[layout.scale_dtype]),
    }
    if layout.outer:
        parts[layout.outer] = scales[0].reshape(1)
    if is_static:
        parts[layout.input_outer] = power_of_two(12.0, layout.operand).reshape(1)
    if layout.reciprocal:
        parts |= {
            name: 1 / parts[name] for name in (layout.outer, layout.input_outer) if name in parts
        }
    return {f"{layer}.{name}": tensor for name, tensor in parts.items()}


def write(folder: Path, kind: str = "nvfp4", *, is_static: bool = True) -> Path:
    """Write a whole checkpoint.

    Args:
        folder: Where to; it must not exist.
        kind: ``nvfp4``, ``mxfp4``, ``mxfp6``, ``mxfp8`` or ``modelopt``.
        is_static: Whether inputs of NVFP4 layers are quantized, with a static scale.
    """
    folder.mkdir()
    layout = LAYOUTS[kind]
    is_static = is_static and bool(layout.input_outer)
    tensors = {"model.norm.weight": torch.ones(K), "model.q_proj.bias": torch.zeros(N)}
    for layer in LAYERS:
        tensors |= quantized(layer, layout, is_static)
    save_file(tensors, folder / WEIGHTS)
    config: dict[str, Any] = {"architectures": ["Tiny"], "dtype": "float32"}
    if kind == "modelopt":
        facts = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": facts}))
    else:
        config["quantization_config"] = _section(layout, is_static)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _section(layout: Layout, is_static: bool) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout.name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weight_arguments(layout),
                "input_activations": input_arguments(INPUTS[0]) if is_static else None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }


def edit_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Return what changes the tensors of a folder."""

    def edit(folder: Path) -> None:
        # Copies: the file that they are mapped from is written anew.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)

    return edit


def edit_json(
    change: Callable[[dict[str, Any]], None], name: str = "config.json"
) -> Callable[[Path], None]:
    """Return what changes a JSON file of a folder."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return edit


def edit_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return what changes ``quantization_config``."""
    return edit_json(lambda data: change(data["quantization_config"]))


def edit_group(part: str, **values: Any) -> Callable[[Path], None]:
    """Return what changes how weights or inputs are described."""

    def change(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"][part].update(values)

    return edit_config(change)
