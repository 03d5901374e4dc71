"""Artifacts as compressed-tensors folders: what other tools read in them, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import fpcompiler
from fpcompiler.errors import CheckpointError, ExportError, OptionError, PassError
from fpcompiler.interop.checkpoints import files
from fpcompiler.interop.checkpoints.layers import stored_layers
from fpcompiler.interop.checkpoints.reading import RECORD, read_checkpoint
from fpcompiler.runtime.model import CompiledModel
from tests.interop import vllm_rules
from tests.interop.folders import DATA, edit_json, edit_tensors
from tests.interop.test_import import decompressed

transformers = pytest.importorskip("transformers")

BASE = DATA / "base"
IDS = torch.arange(3, 27).reshape(2, 12)
NVFP4 = "f4E2M1FN@tensor:f32/block16:f8E4M3FN"

OPTIONS: dict[str, dict[str, Any]] = {
    f"w={NVFP4},a=none": {"share_scales": True},
    "nvfp4": {"share_scales": True, "static_inputs": True, "calibration": [{"input_ids": IDS}]},
    "w=f4E2M1FN@block32:f8E8M0FNU,a=none": {},  # scales of the better rounding
    "mxfp4": {},
    "mxfp6": {},
    "mxfp8": {},
    "mxfp4; *.down_proj: mxfp8": {},
    f"mxfp4; *.q_proj: skip; *.k_proj: skip; *.v_proj: skip; *.o_proj: w={NVFP4},a=none": {
        "share_scales": True
    },
}
"""Schemes that the format can express, with what they need."""

Compiled = Callable[[str], CompiledModel]

_SLOW = pytest.mark.slow
SOME = [
    pytest.param(scheme, marks=() if scheme in ("nvfp4", [*OPTIONS][-1]) else _SLOW)
    for scheme in OPTIONS
]
"""All of them; by default those that differ most, since an import captures the model."""


def base() -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def captured() -> torch.export.ExportedProgram:
    """Return the model captured once: what is left of a compilation is quick."""
    return torch.export.export(base(), (), {"input_ids": IDS, "use_cache": False})


@pytest.fixture(scope="module")
def compiled(captured: torch.export.ExportedProgram) -> Compiled:
    """Return a function that compiles the model in fp32, once for each scheme."""
    done: dict[str, CompiledModel] = {}

    def of(scheme: str) -> CompiledModel:
        if scheme not in done:
            done[scheme] = fpcompiler.compile(
                captured, scheme, target="reference", **OPTIONS[scheme]
            )
        return done[scheme]

    return of


@pytest.fixture(scope="module")
def exported(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a scheme."""
    done: dict[str, Path] = {}

    def of(scheme: str) -> Path:
        if scheme not in done:
            done[scheme] = tmp_path_factory.mktemp("export") / "model"
            result = compiled(scheme).export(done[scheme], "compressed-tensors", model=BASE)
            assert sum(result.facts["layers"].values()) in (4, 7)
            assert all(file.is_file() for file in result.files)
        return done[scheme]

    return of


@pytest.mark.parametrize("scheme", OPTIONS)
def test_compressed_tensors_decompresses_exactly_our_values(
    scheme: str, compiled: Compiled, exported: Callable[[str], Path]
) -> None:
    expected = stored_layers(compiled(scheme).artifact)
    values = decompressed(exported(scheme))
    assert values.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(values[name].float(), layer.dequantized())  # though they are in bf16


@pytest.mark.parametrize("scheme", SOME)
def test_the_way_back_gives_every_bit(
    scheme: str, compiled: Compiled, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    before = compiled(scheme).artifact
    after = fpcompiler.import_checkpoint(
        exported(scheme), original=BASE, target="reference", example_kwargs={"input_ids": IDS}
    )
    first, second = stored_layers(before), stored_layers(after.artifact)
    assert first.keys() == second.keys()
    for name, layer in first.items():
        assert str(layer.operand) == str(second[name].operand)
        for a, b in zip(
            (layer.codes, *layer.scales), (second[name].codes, *second[name].scales), strict=True
        ):
            assert torch.equal(a, b)
    assert torch.equal(after(input_ids=IDS).logits, compiled(scheme)(input_ids=IDS).logits)


@pytest.mark.parametrize("scheme", [s for s in OPTIONS if s != "mxfp6"])
def test_vllm_would_load_it(scheme: str, exported: Callable[[str], Path]) -> None:
    sizes = {
        name: (module.out_features, module.in_features)
        for name, module in base().named_modules()
        if isinstance(module, nn.Linear)
    }
    layers = vllm_rules.load(exported(scheme), sizes)
    assert len(layers) == (3 if "skip" in scheme else 4)


def test_the_rules_of_vllm_catch_what_it_would_not(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    sizes = {
        n: (m.out_features, m.in_features)
        for n, m in base().named_modules()
        if isinstance(m, nn.Linear)
    }
    folder = tmp_path / "broken"
    shutil.copytree(exported("nvfp4"), folder)
    name = "model.layers.0.self_attn.k_proj"
    edit_tensors(
        lambda t: t.update({f"{name}.weight_global_scale": t[f"{name}.weight_global_scale"] * 2})
    )(folder)
    with pytest.raises(AssertionError, match="takes the largest"):
        vllm_rules.load(folder, sizes)
    edit_tensors(lambda t: t.__delitem__(f"{name}.weight_global_scale"))(folder)
    with pytest.raises(AssertionError, match="unfilled"):
        vllm_rules.load(folder, sizes)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")
@pytest.mark.parametrize("scheme", [f"w={NVFP4},a=none", pytest.param("mxfp4", marks=_SLOW)])
def test_transformers_computes_what_the_reference_does(
    scheme: str, compiled: Compiled, exported: Callable[[str], Path]
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = exported(scheme)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    ours = fpcompiler.import_checkpoint(
        folder, weights_only=True, target="reference", example_kwargs={"input_ids": IDS}
    )
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
        )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.bfloat16  # compressed-tensors decompresses to nothing else
    with torch.no_grad():
        assert plain(input_ids=IDS).logits.isfinite().all()


def test_the_folder_has_what_the_original_has(exported: Callable[[str], Path]) -> None:
    folder = exported("mxfp4")
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        RECORD,
    }
    before, after = load_file(BASE / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == 32
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_a_change_of_our_folder_is_found(exported: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(exported("mxfp4"), folder)
    name = "model.layers.0.mlp.up_proj.weight_packed"
    edit_tensors(lambda t: t.update({name: t[name] << 4 | t[name] >> 4}))(folder)  # swapped nibbles
    with pytest.raises(CheckpointError, match=rf"{name}.*checksum"):
        read_checkpoint(folder)
    edit_json(lambda record: record.update(version=99), RECORD)(folder)
    with pytest.raises(CheckpointError, match="version 99"):
        read_checkpoint(folder)
    (folder / RECORD).unlink()
    assert len(read_checkpoint(folder).layers) == 7  # nothing shows it any more


REFUSED = [
    ("w4a16", {}, "q_proj.*no format for weights in f4E2M1FN@row:f32/block32"),
    ("w4a6", {}, "q_proj.*no format for weights"),
    ("w=f4E3M0FN@block32:f8E8M0FNU,a=none", {}, "q_proj.*no format for weights in f4E3M0FN"),
    ("w_mxfp4_a_mxfp6_e3m2", {}, "q_proj.*no reader of the format quantizes inputs to f6E3M2FN"),
    ("nvfp4", {"share_scales": True}, "q_proj.*computed at each call.*--static-inputs"),
    (f"w={NVFP4},a=none", {}, "(q|k)_proj.*--share-scales"),
    ("mxfp4; *.q_proj: mxfp8", {}, "k_proj.*quantized otherwise than '.*q_proj'"),
    ("mxfp4", {"method": "rotate"}, "the pass rotate has changed"),
    ("w=none,a=none; *.z: mxfp4", {}, "no quantized layer"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The rule .* matches no layer:UserWarning")
@pytest.mark.parametrize(("scheme", "options", "why"), REFUSED, ids=[r[0][:30] for r in REFUSED])
def test_what_the_format_cannot_express_is_refused(
    captured: torch.export.ExportedProgram,
    scheme: str,
    options: dict[str, Any],
    why: str,
    tmp_path: Path,
) -> None:
    model = fpcompiler.compile(captured, scheme, target="reference", **options)
    with pytest.raises(ExportError, match=why):
        model.export(tmp_path / "folder", "compressed-tensors", model=BASE)
    assert not any(tmp_path.iterdir())


def test_another_model_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    edit_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 2}))(other)
    with pytest.raises(ExportError, match=r"'model.norm.weight'.*not that of the compiled model"):
        compiled("mxfp4").export(tmp_path / "folder", "compressed-tensors", model=other)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(lambda t: t.update({name: t["model.layers.0.mlp.gate_proj.weight"].clone()}))(
        other
    )
    with pytest.raises(CheckpointError, match=r"up_proj.*was not made from this original"):
        compiled("mxfp4").export(tmp_path / "folder", "compressed-tensors", model=other)
    with pytest.raises(ExportError, match="--model FOLDER"):
        compiled("mxfp4").export(tmp_path / "folder", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_server_of_another_user_can_read_what_it_can_read_of_the_config(
    compiled: Compiled, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    compiled("mxfp4").export(folder, "compressed-tensors", model=BASE)
    modes = {(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_a_full_disk_leaves_nothing(compiled: Compiled, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(ExportError, match="folder could not be written: I/O error: No space left"):
        compiled("mxfp4").export(tmp_path / "folder", "compressed-tensors", model=BASE)
    assert not [*tmp_path.iterdir()]


def test_nothing_is_written_over(compiled: Compiled, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        compiled("mxfp4").export(tmp_path / "folder", "compressed-tensors", model=BASE)


@pytest.mark.parametrize(
    "tool", ["llmcompressor-nvfp4", pytest.param("llmcompressor-mxfp4", marks=_SLOW)]
)
def test_convert_to_an_artifact_and_back_gives_the_same_file(tool: str, tmp_path: Path) -> None:
    there = fpcompiler.convert(DATA / tool, tmp_path / "model.fpc")
    assert (there.layers, there.path) == (7, tmp_path / "model.fpc")
    back = fpcompiler.convert(tmp_path / "model.fpc", tmp_path / "again", model=DATA / tool)
    assert (back.layers, back.bytes) == (there.layers, there.bytes)
    before = load_file(DATA / tool / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))


def test_convert_refuses_what_it_cannot_compare_or_keep(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="fpcompiler export"):
        fpcompiler.convert(DATA / "llmcompressor-mxfp4", tmp_path / "model.onnx")
    fpcompiler.convert(DATA / "modelopt-nvfp4", tmp_path / "model.fpc")
    with pytest.raises(ExportError, match="no fp32 number gives the same values"):
        fpcompiler.convert(tmp_path / "model.fpc", tmp_path / "folder", model=BASE)


def test_share_scales_needs_a_method_that_takes_them() -> None:
    with pytest.raises(PassError, match=r"search searches them.*rtn, mse"):
        fpcompiler.compile(base(), "nvfp4", method="search", share_scales=True, calibration=[IDS])
