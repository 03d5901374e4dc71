"""What vLLM does with a compressed-tensors folder until its kernels start, as rules.

Written from its loaders (``vllm/model_executor/layers/quantization/compressed_tensors``: the scheme
classes for NVFP4, MXFP4 and MXFP8, ``utils.py``, and the stacked parameters of ``llama.py``): which
parameters a layer has, their types and shapes, how names of the file become names of parameters,
and which layers are one. A parameter that no tensor fills stays what happened to be in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass
class Layer:
    """A linear layer as vLLM makes it: one, or several that are run as one.

    Attributes:
        name: With the fused name at its end.
        parts: Names in the checkpoint.
        rows: Outputs of each.
        k: Inputs.
        parameters: What is to be filled: type and shape.
        filled: Tensors of the file that were loaded, per parameter and part.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    k: int
    parameters: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    filled: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def load(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, Layer]:
    """Load a folder by the rules; anything that vLLM would not notice, or fail at, is an assertion.

    Args:
        folder: The checkpoint.
        sizes: Rows and columns of every linear layer of the model, by its name in the checkpoint.

    Returns:
        The quantized layers by their fused names.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    layers = {name: layer for name, layer in _layers(sizes).items() if not _ignored(layer, config)}
    for layer in layers.values():
        layer.parameters = _parameters(layer, _scheme(layer, config))
    _fill(layers, load_file(folder / "model.safetensors"), sizes)
    for layer in layers.values():
        _check(layer)
    return layers


def _layers(sizes: dict[str, tuple[int, int]]) -> dict[str, Layer]:
    found = {}
    for name, (_, k) in sizes.items():
        parent, _, last = name.rpartition(".")
        fused = next((key for key, parts in FUSED.items() if last in parts), None)
        parts = tuple(f"{parent}.{part}" for part in FUSED[fused]) if fused else (name,)
        whole = f"{parent}.{fused}" if fused else name
        found[whole] = Layer(whole, parts, tuple(sizes[part][0] for part in parts), k)
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name
        for pattern in patterns
    )


def _ignored(layer: Layer, config: dict[str, Any]) -> bool:
    ignored = {_matches(part, config["ignore"]) for part in layer.parts}
    assert len(ignored) == 1, f"{layer.name}: its parts are not all ignored, or all not"
    return ignored.pop()


def _scheme(layer: Layer, config: dict[str, Any]) -> dict[str, Any]:
    """Find the group: by the layer's name, then by its class, then by the names of its parts."""
    for group in config["config_groups"].values():
        by_class = any(target.lower() in "qkvparallellinear" for target in group["targets"])
        if by_class or all(_matches(part, group["targets"]) for part in layer.parts):
            found: dict[str, Any] = group
            return found
    raise AssertionError(f"{layer.name}: no target matches, so it would be loaded unquantized")


def _parameters(
    layer: Layer, scheme: dict[str, Any]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    weights, inputs = scheme["weights"], scheme["input_activations"]
    key = (weights["num_bits"], weights["type"], weights["strategy"], weights["group_size"])
    n, k, parts = sum(layer.rows), layer.k, len(layer.parts)
    assert weights["symmetric"]
    if key == (4, "float", "tensor_group", 16):
        # The kind of input is not looked at beyond these: its scale is expected to be stored.
        same = ("num_bits", "type", "strategy", "group_size", "symmetric")
        assert inputs is None or all(inputs[name] == weights[name] for name in same)
        static = {} if inputs is None else {"input_global_scale": (torch.float32, (parts,))}
        return {
            "weight_packed": (torch.uint8, (n, k // 2)),
            "weight_global_scale": (torch.float32, (parts,)),
            "weight_scale": (torch.float8_e4m3fn, (n, k // 16)),
            **static,
        }
    if key == (4, "float", "group", 32):
        return {
            "weight_packed": (torch.uint8, (n, k // 2)),
            "weight_scale": (torch.uint8, (n, k // 32)),
        }
    assert key == (8, "float", "group", 32), f"vLLM has no scheme for {key}"
    return {"weight": (torch.float8_e4m3fn, (n, k)), "weight_scale": (torch.uint8, (n, k // 32))}


def _fill(layers: dict[str, Layer], tensors: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    owners = {part: layer for layer in layers.values() for part in layer.parts}
    for name, tensor in tensors.items():
        part, _, parameter = name.rpartition(".")
        layer = owners.get(part)
        if layer is None:
            assert parameter in ("weight", "bias"), f"{name}: no parameter of that name"
            continue
        if parameter != "bias":
            assert parameter in layer.parameters, f"{name}: the layer has no such parameter"
            layer.filled[parameter, part] = tensor


def _check(layer: Layer) -> None:
    for parameter, (dtype, shape) in layer.parameters.items():
        found = [layer.filled.get((parameter, part)) for part in layer.parts]
        assert all(t is not None for t in found), f"{layer.name}.{parameter} would stay unfilled"
        tensors = [t for t in found if t is not None]
        assert {t.dtype for t in tensors} == {dtype}
        # Scales of tensors are one number for each part; other parameters are stacked by rows.
        whole = torch.cat(
            [t.reshape(1) if len(shape) == 1 else t.view(torch.uint8) for t in tensors]
        )
        assert whole.shape == shape
        if len(shape) == 1:
            assert whole.unique().numel() == 1, f"{layer.name}.{parameter}: vLLM takes the largest"
            assert bool((1 / (1 / whole) == whole).all())  # alpha is made of its inverse
