"""Checkpoints that are broken on purpose: each is refused, with the tensor and the cause."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fpcompiler.errors import CheckpointError
from fpcompiler.interop.checkpoints.files import Tensors
from fpcompiler.interop.checkpoints.original import require_near
from fpcompiler.interop.checkpoints.reading import read_checkpoint
from tests.interop.breaking import (
    BIAS,
    CONFIG,
    F8,
    GLOBAL,
    GROUP,
    INPUT,
    MODELOPT,
    PACKED,
    PLAIN,
    SCALE,
    SECOND,
    WEIGHT,
    Edit,
    Q,
    add,
    as_bytes,
    config,
    cut_file,
    drop,
    filled,
    inputs,
    integers,
    interleave,
    modelopt,
    put,
    rewrite,
    swapped,
    swizzled_kernel_order,
    targets,
    two_files,
    weights,
)
from tests.interop.folders import (
    WEIGHTS,
    edit_json,
    edit_tensors,
    write,
    write_original,
)


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
    break_it: Edit
    where: str
    why: str
    kind: str = "nvfp4"


CASES = [
    # Tensors that are not there, or should not be.
    Broken("no block scales", drop(SCALE), SCALE, "is missing"),
    Broken("no global scale", drop(GLOBAL), GLOBAL, "missing"),
    Broken("no input scale", drop(INPUT), INPUT, "in memory"),
    Broken("no codes", drop(PACKED), f"{Q}.", "no codes of a weight"),
    Broken("no block scales, MX", drop(SCALE), SCALE, "missing", "mxfp4"),
    Broken("no second scale, ModelOpt", drop(SECOND), SECOND, "missing", "modelopt"),
    Broken(
        "no input scale, ModelOpt",
        drop(f"{Q}.input_scale"),
        f"{Q}.input_scale",
        "missing",
        "modelopt",
    ),
    Broken("no codes, ModelOpt", drop(PLAIN), PLAIN, "missing", "modelopt"),
    Broken(
        "a plain weight beside codes",
        add(PLAIN, torch.ones(128, 128)),
        WEIGHT,
        "no such tensor beside",
    ),
    Broken(
        "a zero point",
        add(f"{Q}.weight_zero_point", torch.ones(128, 4)),
        "weight_zero_point",
        "no such tensor",
    ),
    Broken(
        "an order of groups",
        add(f"{Q}.weight_g_idx", torch.ones(64)),
        "weight_g_idx",
        "no such tensor",
    ),
    Broken(
        "a scale before quantizing",
        add(f"{Q}.pre_quant_scale", torch.ones(64)),
        "pre_quant_scale",
        "no such tensor",
        "modelopt",
    ),
    Broken(
        "a scale of another layer",
        add("model.o_proj.weight_scale", torch.ones(4)),
        "model.o_proj.weight_scale",
        "no codes",
    ),
    Broken("a global scale of MX", add(GLOBAL, torch.ones(1)), GLOBAL, "no such tensor", "mxfp4"),
    # Types.
    Broken("codes as int8", put(PACKED, lambda t: t.view(torch.int8)), PACKED, "I8"),
    Broken("scales as bytes", put(SCALE, lambda t: t.view(torch.uint8)), SCALE, "F8_E4M3"),
    Broken("scales as fp32", put(SCALE, lambda t: t.float()), SCALE, "F32"),
    Broken("E4M3 scales in MX", put(SCALE, lambda t: t.view(F8)), SCALE, "powers of two", "mxfp4"),
    Broken("a global scale in bf16", put(GLOBAL, lambda t: t.bfloat16()), GLOBAL, "BF16"),
    Broken(
        "codes of MXFP8 as bytes",
        put(PLAIN, lambda t: t.view(torch.uint8)),
        WEIGHT,
        "F8_E4M3",
        "mxfp8",
    ),
    # Shapes.
    Broken(
        "codes that are not packed",
        put(PACKED, lambda t: t.repeat(1, 2)),
        SCALE,
        "128 rows of K = 256",
    ),
    Broken("a flat weight", put(PACKED, lambda t: t.flatten()), PACKED, "[N, bytes of K]"),
    Broken(
        "half a block", put(PACKED, lambda t: t[:, :60]), PACKED, "K = 120, which is no multiple"
    ),
    Broken(
        "scales transposed", put(SCALE, as_bytes(lambda t: t.T.contiguous())), SCALE, "transposed"
    ),
    Broken(
        "scales padded and swizzled", put(PACKED, lambda t: t[:120]), SCALE, "padded and swizzled"
    ),
    Broken(
        "scales of blocks of 32",
        put(SCALE, as_bytes(lambda t: t[:, ::2].contiguous())),
        SCALE,
        "blocks of 32",
    ),
    Broken(
        "scales of blocks of 16 in MX",
        put(SCALE, lambda t: t.repeat(1, 2)),
        SCALE,
        "blocks of 16",
        "mxfp4",
    ),
    Broken(
        "flattened scales",
        put(SCALE, as_bytes(lambda t: t.flatten())),
        SCALE,
        "reordered for a kernel, or flattened",
    ),
    Broken("a row too few", put(SCALE, as_bytes(lambda t: t[:-1])), SCALE, "[128, 8] scales"),
    Broken("two global scales", put(GLOBAL, lambda t: t.repeat(3)), GLOBAL, "one scale"),
    Broken("a bias of another layer", put(BIAS, lambda t: t[:64]), BIAS, "128 rows"),
    # Values.
    Broken("a NaN scale", put(SCALE, filled(0x7F)), SCALE, r"\[5, 1\]\) are NaN"),
    Broken("a NaN power", put(SCALE, filled(0xFF)), SCALE, "NaN", "mxfp4"),
    Broken("a negative scale", put(SCALE, filled(0x98)), SCALE, "negative"),
    Broken("a zero scale", put(SCALE, filled(0)), SCALE, "values are lost"),
    Broken("a NaN code", put(PLAIN, filled(0x7F)), WEIGHT, "NaN", "mxfp8"),
    Broken("a NaN global scale", put(GLOBAL, lambda t: t * float("nan")), GLOBAL, "it is nan"),
    Broken("a global scale of zero", put(GLOBAL, lambda t: t * 0), GLOBAL, "it is 0"),
    Broken("a negative global scale", put(GLOBAL, lambda t: -t), GLOBAL, "positive"),
    Broken("an infinite input scale", put(INPUT, lambda t: t / 0), INPUT, "it is inf"),
    Broken(
        "a NaN norm",
        put("model.norm.weight", lambda t: t * float("nan")),
        "model.norm.weight",
        "NaN or infinity",
    ),
    # What only the size and the order of values show.
    Broken(
        "a reciprocal global scale",
        put(GLOBAL, lambda t: 1 / t),
        GLOBAL,
        "looks like the scale itself",
    ),
    Broken(
        "a reciprocal second scale",
        put(SECOND, lambda t: 1 / t),
        SECOND,
        "looks like one over it",
        "modelopt",
    ),
    Broken(
        "reciprocal input scales",
        edit_tensors(lambda t: t.update({n: 1 / v for n, v in t.items() if "input" in n})),
        "input_global_scale",
        "looks like the scale itself",
    ),
    Broken("reciprocal powers", put(SCALE, lambda t: 255 - t), SCALE, "reciprocals", "mxfp4"),
    Broken(
        "swizzled scales of the same shape",
        put(SCALE, swizzled_kernel_order),
        SCALE,
        "stored swizzled",
    ),
    Broken("integers in place of E2M1", put(PACKED, integers), PACKED, "sign and magnitude"),
    Broken(
        "offset integers", put(PACKED, lambda t: integers(t) ^ 0x88), PACKED, "sign and magnitude"
    ),
    Broken("codes that were never filled", put(PACKED, torch.zeros_like), PACKED, "never filled"),
    Broken(
        "codes halved",
        put(PACKED, lambda t: (t & 0x88) | (t & 0x77) // 2 & 0x33),
        PACKED,
        "do not belong together",
    ),
    # Files.
    Broken("half of the file", cut_file, WEIGHTS, "no whole safetensors file"),
    Broken("no weights", lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "missing"),
    Broken("no config", lambda folder: (folder / CONFIG).unlink(), CONFIG, "missing"),
    Broken("a config that is no JSON", rewrite(CONFIG, "{'a': 1}"), CONFIG, "no JSON"),
    Broken(
        "a file of several missing",
        lambda folder: two_files(folder, "missing"),
        "b.safetensors",
        "missing",
    ),
    Broken(
        "an index that lies",
        lambda folder: two_files(folder, "moved"),
        "index.json",
        "should be in b",
    ),
    Broken(
        "an index that leaves out",
        lambda folder: two_files(folder, "unlisted"),
        "index.json",
        "does not list",
    ),
    Broken(
        "an index that leads outside",
        lambda folder: two_files(folder, "outside"),
        "index.json",
        "outside",
    ),
    # Configs that lie.
    Broken(
        "no quantization_config",
        edit_json(lambda c: c.pop("quantization_config") and None),
        CONFIG,
        "not quantized",
    ),
    Broken("another method", config(quant_method="gptq"), CONFIG, "quant_method is 'gptq'"),
    Broken(
        "another format", config(format="mxfp4-pack-quantized"), GROUP, "group_size is 16, not 32"
    ),
    Broken("an unknown format", config(format="pack-quantized"), GROUP, "pack-quantized"),
    Broken("no format", config(format=None), GROUP, "has no format"),
    Broken("another block", weights(group_size=32), GROUP, "group_size is 32, not 16"),
    Broken("another width", weights(num_bits=8), GROUP, "num_bits is 8, not 4"),
    Broken("integers", weights(type="int"), GROUP, "type is 'int'"),
    Broken("zero points", weights(symmetric=False), GROUP, "symmetric is False"),
    Broken("weights per channel", weights(strategy="channel"), GROUP, "strategy is 'channel'"),
    Broken("dynamic weights", weights(dynamic=True), GROUP, "dynamic is True"),
    Broken("reordered columns", weights(actorder="group"), GROUP, "actorder is 'group'"),
    Broken("a new argument", weights(rotate=True), GROUP, "'rotate' is not known"),
    Broken("inputs as integers", inputs(type="int"), GROUP, "input_activations"),
    Broken("a static scale of inputs", inputs(dynamic=False), GROUP, "input_activations"),
    Broken("not compressed", config(quantization_status="frozen"), CONFIG, "not stored as codes"),
    Broken("a transform", config(transform_config={"groups": {}}), CONFIG, "transform_config"),
    Broken("a sparse model", config(sparsity_config={"format": "x"}), CONFIG, "sparsity_config"),
    Broken("no groups", config(config_groups={}), CONFIG, "no group"),
    Broken("a quantized layer ignored", config(ignore=[Q]), PLAIN, "not quantized"),
    Broken("a layer without a group", targets("model.k_proj"), PLAIN, "no group"),
    Broken(
        "a layer that is not there",
        targets("re:model.*_proj", "model.z_proj"),
        CONFIG,
        "model.z_proj",
    ),
    Broken(
        "a plain layer called quantized",
        lambda f: targets("re:model.*_proj", "model.norm")(f),
        "model.norm.weight",
        "plain weight",
    ),
    Broken("a pattern that is none", targets("re:("), CONFIG, "no regular expression"),
    Broken(
        "another algorithm", modelopt(quant_algo="FP8"), MODELOPT, "quant_algo is 'FP8'", "modelopt"
    ),
    Broken(
        "another block, ModelOpt", modelopt(group_size=32), MODELOPT, "group_size is 32", "modelopt"
    ),
    Broken(
        "a layer excluded",
        modelopt(exclude_modules=["model*"]),
        "model.k_proj.weight",
        "not quantized",
        "modelopt",
    ),
]


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
    break_it: Edit
    why: str
    kind: str = "nvfp4"


AGAINST_ORIGINAL = [
    Other("swapped nibbles", put(PACKED, swapped), "nibbles are swapped"),
    Other("swapped nibbles, MX", put(PACKED, swapped), "nibbles are swapped", "mxfp4"),
    Other("signs", put(PACKED, lambda t: t ^ 0x88), "all signs"),
    Other("a global scale of another layer", put(GLOBAL, lambda t: t / 3), "3 times as large"),
    Other("powers with another bias", put(SCALE, lambda t: t + 1), "2 times as large", "mxfp4"),
    Other(
        "weights of another layer",
        edit_tensors(lambda t: t.update({PACKED: t["model.k_proj.weight_packed"].clone()})),
        "not made from this original",
    ),
    Other("rows in the order of a kernel", interleave, "interleaved"),
]


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
    put(GLOBAL, lambda t: 1 / t)(folder)
    with pytest.raises(CheckpointError, match="--no-check-values"):
        read_checkpoint(folder)
    assert read_checkpoint(folder, check_values=False).layers[Q].dequantized().abs().max() > 1e4
