"""Checkpoints that are broken on purpose: each is refused, with the tensor and the cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpcompiler.errors import CheckpointError
from fpcompiler.interop.checkpoints.files import Tensors
from fpcompiler.interop.checkpoints.original import require_near
from fpcompiler.interop.checkpoints.reading import read_checkpoint
from fpcompiler.numerics.kernel_layout import swizzle_scales
from tests.interop.folders import (
    WEIGHTS,
    edit_config,
    edit_group,
    edit_json,
    edit_tensors,
    write,
    write_original,
)

Q = "model.q_proj"
F8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Broken:
    """One way to break a checkpoint.

    Attributes:
        name: What is done to it.
        break_it: Does it to a folder.
        where: What the error must name: a tensor, a file, or a group of the config.
        why: What it must say.
        kind: Of the checkpoint.
    """

    name: str
    break_it: Callable[[Path], None]
    where: str
    why: str
    kind: str = "nvfp4"


def drop(name: str) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.__delitem__(name))


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def add(name: str, tensor: Tensor) -> Callable[[Path], None]:
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


def unfilled(scale: Tensor) -> Tensor:
    """Return scales of blocks twice as long, each for two blocks."""
    wide = scale.view(torch.uint8).view(len(scale), -1, 2).max(-1).values
    return wide.repeat_interleave(2, 1).view(scale.dtype)


def swizzled_kernel_order(scale: Tensor) -> Tensor:
    return swizzle_scales(scale.view(torch.uint8)).view(scale.shape).view(scale.dtype)


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


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def config(**values: Any) -> Callable[[Path], None]:
    return edit_config(lambda data: data.update(values))


def targets(*names: str) -> Callable[[Path], None]:
    return edit_config(lambda data: data["config_groups"]["group_0"].update(targets=list(names)))


CASES = [
    # Tensors that are not there, or should not be.
    Broken("no block scales", drop(f"{Q}.weight_scale"), f"{Q}.weight_scale", "is missing"),
    Broken("no global scale", drop(f"{Q}.weight_global_scale"), f"{Q}.weight_global_scale", "missing"),
    Broken("no input scale", drop(f"{Q}.input_global_scale"), f"{Q}.input_global_scale", "in memory"),
    Broken("no codes", drop(f"{Q}.weight_packed"), f"{Q}.", "no codes of a weight"),
    Broken("no block scales, MX", drop(f"{Q}.weight_scale"), f"{Q}.weight_scale", "missing", "mxfp4"),
    Broken("no second scale, ModelOpt", drop(f"{Q}.weight_scale_2"), f"{Q}.weight_scale_2", "missing", "modelopt"),
    Broken("no input scale, ModelOpt", drop(f"{Q}.input_scale"), f"{Q}.input_scale", "missing", "modelopt"),
    Broken("no codes, ModelOpt", drop(f"{Q}.weight"), f"{Q}.weight", "missing", "modelopt"),
    Broken("a plain weight beside codes", add(f"{Q}.weight", torch.ones(128, 128)), f"{Q}.weight'", "no such tensor beside"),
    Broken("a zero point", add(f"{Q}.weight_zero_point", torch.ones(128, 4)), "weight_zero_point", "no such tensor"),
    Broken("an order of groups", add(f"{Q}.weight_g_idx", torch.ones(64)), "weight_g_idx", "no such tensor"),
    Broken("a scale before quantizing", add(f"{Q}.pre_quant_scale", torch.ones(64)), "pre_quant_scale", "no such tensor", "modelopt"),
    Broken("a scale of another layer", add("model.o_proj.weight_scale", torch.ones(4)), "model.o_proj.weight_scale", "no codes"),
    Broken("a global scale of MX", add(f"{Q}.weight_global_scale", torch.ones(1)), "weight_global_scale", "no such tensor", "mxfp4"),
    # Types.
    Broken("codes as int8", put(f"{Q}.weight_packed", lambda t: t.view(torch.int8)), f"{Q}.weight_packed", "I8"),
    Broken("scales as bytes", put(f"{Q}.weight_scale", lambda t: t.view(torch.uint8)), f"{Q}.weight_scale", "F8_E4M3"),
    Broken("scales as fp32", put(f"{Q}.weight_scale", lambda t: t.float()), f"{Q}.weight_scale", "F32"),
    Broken("E4M3 scales in MX", put(f"{Q}.weight_scale", lambda t: t.view(F8)), f"{Q}.weight_scale", "powers of two", "mxfp4"),
    Broken("a global scale in bf16", put(f"{Q}.weight_global_scale", lambda t: t.bfloat16()), "weight_global_scale", "BF16"),
    Broken("codes of MXFP8 as bytes", put(f"{Q}.weight", lambda t: t.view(torch.uint8)), f"{Q}.weight'", "F8_E4M3", "mxfp8"),
    # Shapes.
    Broken("codes that are not packed", put(f"{Q}.weight_packed", lambda t: t.repeat(1, 2)), f"{Q}.weight_scale", "128 rows of K = 256"),
    Broken("a flat weight", put(f"{Q}.weight_packed", lambda t: t.flatten()), f"{Q}.weight_packed", "[N, bytes of K]"),
    Broken("half a block", put(f"{Q}.weight_packed", lambda t: t[:, :60]), f"{Q}.weight_packed", "K = 120, which is no multiple"),
    Broken("scales transposed", put(f"{Q}.weight_scale", as_bytes(lambda t: t.T.contiguous())), f"{Q}.weight_scale", "transposed"),
    Broken("scales padded and swizzled", put(f"{Q}.weight_packed", lambda t: t[:120]), f"{Q}.weight_scale", "padded and swizzled"),
    Broken("scales of blocks of 32", put(f"{Q}.weight_scale", as_bytes(lambda t: t[:, ::2].contiguous())), f"{Q}.weight_scale", "blocks of 32"),
    Broken("scales of blocks of 16 in MX", put(f"{Q}.weight_scale", lambda t: t.repeat(1, 2)), f"{Q}.weight_scale", "blocks of 16", "mxfp4"),
    Broken("flattened scales", put(f"{Q}.weight_scale", as_bytes(lambda t: t.flatten())), f"{Q}.weight_scale", "reordered for a kernel, or flattened"),
    Broken("a row too few", put(f"{Q}.weight_scale", as_bytes(lambda t: t[:-1])), f"{Q}.weight_scale", "[128, 8] scales"),
    Broken("two global scales", put(f"{Q}.weight_global_scale", lambda t: t.repeat(3)), "weight_global_scale", "one scale"),
    Broken("a bias of another layer", put(f"{Q}.bias", lambda t: t[:64]), f"{Q}.bias", "128 rows"),
    # Values.
    Broken("a NaN scale", put(f"{Q}.weight_scale", filled(0x7F)), f"{Q}.weight_scale", r"\[5, 1\]\) are NaN"),
    Broken("a NaN power", put(f"{Q}.weight_scale", filled(0xFF)), f"{Q}.weight_scale", "NaN", "mxfp4"),
    Broken("a negative scale", put(f"{Q}.weight_scale", filled(0x98)), f"{Q}.weight_scale", "negative"),
    Broken("a zero scale", put(f"{Q}.weight_scale", filled(0)), f"{Q}.weight_scale", "values are lost"),
    Broken("a NaN code", put(f"{Q}.weight", filled(0x7F)), f"{Q}.weight'", "NaN", "mxfp8"),
    Broken("a NaN global scale", put(f"{Q}.weight_global_scale", lambda t: t * float("nan")), "weight_global_scale", "it is nan"),
    Broken("a global scale of zero", put(f"{Q}.weight_global_scale", lambda t: t * 0), "weight_global_scale", "it is 0"),
    Broken("a negative global scale", put(f"{Q}.weight_global_scale", lambda t: -t), "weight_global_scale", "positive"),
    Broken("an infinite input scale", put(f"{Q}.input_global_scale", lambda t: t / 0), "input_global_scale", "it is inf"),
    Broken("a NaN norm", put("model.norm.weight", lambda t: t * float("nan")), "model.norm.weight", "NaN or infinity"),
    # What only the size and the order of values show.
    Broken("a reciprocal global scale", put(f"{Q}.weight_global_scale", lambda t: 1 / t), "weight_global_scale", "looks like the scale itself"),
    Broken("a reciprocal second scale", put(f"{Q}.weight_scale_2", lambda t: 1 / t), "weight_scale_2", "looks like one over it", "modelopt"),
    Broken(
        "reciprocal input scales",
        edit_tensors(lambda t: t.update({n: 1 / v for n, v in t.items() if "input" in n})),
        "input_global_scale",
        "looks like the scale itself",
    ),
    Broken("reciprocal powers", put(f"{Q}.weight_scale", lambda t: 255 - t), f"{Q}.weight_scale", "reciprocals", "mxfp4"),
    Broken("swizzled scales of the same shape", put(f"{Q}.weight_scale", swizzled_kernel_order), f"{Q}.weight_scale", "stored swizzled"),
    Broken("integers in place of E2M1", put(f"{Q}.weight_packed", integers), f"{Q}.weight_packed", "sign and magnitude"),
    Broken("offset integers", put(f"{Q}.weight_packed", lambda t: integers(t) ^ 0x88), f"{Q}.weight_packed", "sign and magnitude"),
    Broken("codes that were never filled", put(f"{Q}.weight_packed", torch.zeros_like), f"{Q}.weight_packed", "never filled"),
    Broken("codes halved", put(f"{Q}.weight_packed", lambda t: (t & 0x88) | (t & 0x77) // 2 & 0x33), f"{Q}.weight_packed", "do not belong together"),
    # Files.
    Broken("half of the file", cut_file, WEIGHTS, "no whole safetensors file"),
    Broken("no weights", lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "missing"),
    Broken("no config", lambda folder: (folder / "config.json").unlink(), "config.json", "missing"),
    Broken("a config that is no JSON", rewrite("config.json", "{'a': 1}"), "config.json", "no JSON"),
    Broken("a file of several missing", lambda folder: two_files(folder, "missing"), "b.safetensors", "missing"),
    Broken("an index that lies", lambda folder: two_files(folder, "moved"), "index.json", "should be in b"),
    Broken("an index that leaves out", lambda folder: two_files(folder, "unlisted"), "index.json", "does not list"),
    Broken("an index that leads outside", lambda folder: two_files(folder, "outside"), "index.json", "outside"),
    # Configs that lie.
    Broken("no quantization_config", edit_json(lambda c: c.pop("quantization_config") and None), "config.json", "not quantized"),
    Broken("another method", config(quant_method="gptq"), "config.json", "quant_method is 'gptq'"),
    Broken("another format", config(format="mxfp4-pack-quantized"), "'group_0'", "group_size is 16, not 32"),
    Broken("an unknown format", config(format="pack-quantized"), "'group_0'", "pack-quantized"),
    Broken("no format", config(format=None), "'group_0'", "has no format"),
    Broken("another block", edit_group("weights", group_size=32), "'group_0'", "group_size is 32, not 16"),
    Broken("another width", edit_group("weights", num_bits=8), "'group_0'", "num_bits is 8, not 4"),
    Broken("integers", edit_group("weights", type="int"), "'group_0'", "type is 'int'"),
    Broken("zero points", edit_group("weights", symmetric=False), "'group_0'", "symmetric is False"),
    Broken("weights per channel", edit_group("weights", strategy="channel"), "'group_0'", "strategy is 'channel'"),
    Broken("dynamic weights", edit_group("weights", dynamic=True), "'group_0'", "dynamic is True"),
    Broken("reordered columns", edit_group("weights", actorder="group"), "'group_0'", "actorder is 'group'"),
    Broken("a new argument", edit_group("weights", rotate=True), "'group_0'", "'rotate' is not known"),
    Broken("inputs as integers", edit_group("input_activations", type="int"), "'group_0'", "input_activations"),
    Broken("a static scale of inputs", edit_group("input_activations", dynamic=False), "'group_0'", "input_activations"),
    Broken("not compressed", config(quantization_status="frozen"), "config.json", "not stored as codes"),
    Broken("a transform", config(transform_config={"groups": {}}), "config.json", "transform_config"),
    Broken("a sparse model", config(sparsity_config={"format": "x"}), "config.json", "sparsity_config"),
    Broken("no groups", config(config_groups={}), "config.json", "no group"),
    Broken("a quantized layer ignored", config(ignore=[Q]), f"{Q}.weight", "not quantized"),
    Broken("a layer without a group", targets("model.k_proj"), f"{Q}.weight", "no group"),
    Broken("a layer that is not there", targets("re:model.*_proj", "model.z_proj"), "config.json", "model.z_proj"),
    Broken("a plain layer called quantized", lambda f: (targets("re:model.*_proj", "model.norm")(f)), "model.norm.weight", "plain weight"),
    Broken("a pattern that is none", targets("re:("), "config.json", "no regular expression"),
    Broken("another algorithm", edit_json(lambda c: c["quantization"].update(quant_algo="FP8"), "hf_quant_config.json"), "hf_quant_config.json", "quant_algo is 'FP8'", "modelopt"),
    Broken("another block, ModelOpt", edit_json(lambda c: c["quantization"].update(group_size=32), "hf_quant_config.json"), "hf_quant_config.json", "group_size is 32", "modelopt"),
    Broken("a layer excluded", edit_json(lambda c: c["quantization"].update(exclude_modules=["model*"]), "hf_quant_config.json"), f"{'model.k_proj'}.weight", "not quantized", "modelopt"),
]  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp6", "mxfp8", "modelopt"])
def test_what_is_whole_is_read(kind: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path / "whole", kind))
    assert sorted(checkpoint.layers) == ["model.k_proj", "model.q_proj"]
    assert sorted(checkpoint.plain) == ["model.norm.weight", "model.q_proj.bias"]
    assert not checkpoint.notes


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    two_files(folder)
    assert len(read_checkpoint(folder).layers) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_what_is_broken_is_refused(case: Broken, tmp_path: Path) -> None:
    folder = write(tmp_path / "broken", case.kind)
    case.break_it(folder)
    with pytest.raises(CheckpointError, match=re.escape(case.where)) as caught:
        read_checkpoint(folder)
    assert re.search(case.why if "\\" in case.why else re.escape(case.why), str(caught.value))


@dataclass(frozen=True)
class Other:
    """A mistake that shows against the original weights only, and how it is told."""

    name: str
    break_it: Callable[[Path], None]
    why: str
    kind: str = "nvfp4"


AGAINST_ORIGINAL = [
    Other("swapped nibbles", put(f"{Q}.weight_packed", lambda t: t << 4 | t >> 4), "nibbles are swapped"),
    Other("swapped nibbles, MX", put(f"{Q}.weight_packed", lambda t: t << 4 | t >> 4), "nibbles are swapped", "mxfp4"),
    Other("signs", put(f"{Q}.weight_packed", lambda t: t ^ 0x88), "all signs"),
    Other("a global scale of another layer", put(f"{Q}.weight_global_scale", lambda t: t / 3), "3 times as large"),
    Other("powers with another bias", put(f"{Q}.weight_scale", lambda t: t + 1), "2 times as large", "mxfp4"),
    Other("weights of another layer", edit_tensors(lambda t: t.update({f"{Q}.weight_packed": t["model.k_proj.weight_packed"].clone()})), "not made from this original"),
    Other("rows in the order of a kernel", edit_tensors(lambda t: t.update({f"{Q}.{p}": t[f"{Q}.{p}"].view(torch.uint8)[torch.arange(128).view(2, 64).T.flatten()].view(t[f"{Q}.{p}"].dtype) for p in ("weight_packed", "weight_scale")})), "interleaved"),
]  # fmt: skip


@pytest.mark.parametrize("case", AGAINST_ORIGINAL, ids=lambda case: case.name.replace(" ", "-"))
def test_what_no_file_shows_alone_shows_against_the_original(case: Other, tmp_path: Path) -> None:
    folder = write(tmp_path / "broken", case.kind)
    originals = Tensors(write_original(tmp_path / "original"))
    whole = read_checkpoint(folder)
    assert all(require_near(layer, originals, folder) > 15 for layer in whole.layers.values())
    case.break_it(folder)
    layers = read_checkpoint(folder).layers
    with pytest.raises(CheckpointError, match=re.escape(f"'{Q}.weight_packed'")) as caught:
        require_near(layers[Q], originals, folder)
    assert case.why in str(caught.value)


def test_values_that_look_wrong_can_be_taken_all_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "odd")
    put(f"{Q}.weight_global_scale", lambda t: 1 / t)(folder)
    with pytest.raises(CheckpointError, match="--no-check-values"):
        read_checkpoint(folder)
    assert read_checkpoint(folder, check_values=False).layers[Q].dequantized().abs().max() > 1e4
