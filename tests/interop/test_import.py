"""Checkpoints that other tools wrote, imported: their codes, their values, their configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import CheckpointError, PassError
from fpcompiler.interop.checkpoints.reading import read_checkpoint
from tests.interop.folders import (
    DATA,
    LAYERS,
    K,
    N,
    edit_config,
    edit_tensors,
    original,
    write,
    write_original,
)

IDS = torch.arange(3, 27).reshape(2, 12)
TOOLS = ("llmcompressor-nvfp4", "llmcompressor-mxfp4", "modelopt-nvfp4")


class Tiny(nn.Module):
    """The model of :func:`tests.interop.folders.write`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.norm = nn.RMSNorm(K)
        self.model.q_proj = nn.Linear(K, N)
        self.model.k_proj = nn.Linear(K, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.norm(x)
        return self.model.q_proj(x) * self.model.k_proj(x)


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Return the weights as the package compressed-tensors decompresses them, by layer."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    values = {}
    parsed = quantization.QuantizationConfig.model_validate(config)
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part != "weight_scale":
            continue
        named = (g for g in parsed.config_groups.values() if layer in g.targets)
        scheme = next(named, None) or next(iter(parsed.config_groups.values()))
        compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
        own = {
            n.removeprefix(f"{layer}."): t for n, t in tensors.items() if n.startswith(f"{layer}.")
        }
        values[layer] = compressor.decompress(own, scheme)["weight"]
    return values


def decompressed_modelopt(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a ModelOpt checkpoint, by what compressed-tensors makes of it."""
    converters = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4"
    )
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = schemes.preset_name_to_scheme("NVFP4", ["Linear"])
    compressor = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    converter = converters.ModelOptNvfp4Converter(targets=["re:.*_proj$"])
    tensors = converter.process(load_file(folder / "model.safetensors"))
    values = {}
    for layer in [n.removesuffix(".weight_packed") for n in tensors if n.endswith("_packed")]:
        own = {
            n.removeprefix(f"{layer}."): t for n, t in tensors.items() if n.startswith(f"{layer}.")
        }
        own["weight_global_scale"] = own["weight_global_scale"].reshape(1)
        values[layer] = compressor.decompress(own, scheme)["weight"]
    return values


@pytest.mark.parametrize("tool", TOOLS)
def test_values_are_those_of_the_package_compressed_tensors(tool: str) -> None:
    layers = read_checkpoint(DATA / tool).layers
    expected = (decompressed_modelopt if "modelopt" in tool else decompressed)(DATA / tool)
    assert len(layers) == 7
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.dequantized().to(expected[name].dtype), expected[name])


@pytest.mark.parametrize("tool", TOOLS)
def test_codes_are_those_of_the_file_and_results_those_of_the_decompressed_model(
    tool: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    compiled = fpcompiler.import_checkpoint(
        DATA / tool, original=DATA / "base", weights_only=True, target="reference"
    )
    compiled.save(tmp_path / "model.fpc")
    loaded = fpcompiler.load(tmp_path / "model.fpc")
    stored = load_file(DATA / tool / "model.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(DATA / "base", dtype=torch.bfloat16)
    for name, layer in read_checkpoint(DATA / tool).layers.items():
        parts = {
            part: loaded.artifact.tensors.get(f"{name}.weight.{part}")
            for part in ("codes", "block_scale", "outer_scale")
        }
        assert torch.equal(parts["codes"], stored[f"{name}.{layer.layout.codes}"])
        assert torch.equal(parts["block_scale"], stored[f"{name}.weight_scale"].view(torch.uint8))
        assert layer.outer is None or torch.equal(parts["outer_scale"], layer.outer)
        model.get_submodule(name).weight.data = layer.dequantized().bfloat16()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    got = loaded(input_ids=IDS).logits
    # Weights here are not rounded to bf16 before they are multiplied, and sums are fp32.
    assert (got - expected).abs().max() <= 2**-5 * expected.abs().max()


def test_inputs_are_quantized_as_the_config_says() -> None:
    compiled = fpcompiler.import_checkpoint(DATA / "llmcompressor-nvfp4")
    plan = compiled.artifact.plan
    nvfp4 = "f4E2M1FN@tensor:f32/block16:f8E4M3FN"
    assert compiled.scheme == f"w={nvfp4},a={nvfp4},skip=lm_head"
    within = [step for step in plan.steps if step.op == "fpc.quantize_within"]
    assert len(within) == 4  # q, k and v share one, gate and up another
    numbers = load_file(DATA / "llmcompressor-nvfp4" / "model.safetensors")
    key = plan.constants[within[0].args[1]["v"]]
    stored = numbers["model.layers.0.self_attn.q_proj.input_global_scale"]
    assert float(compiled.artifact.tensors[key]) == float(1 / stored)


def test_inputs_of_their_own_scales_stay_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")
    edit_tensors(lambda t: t.update({"model.k_proj.input_global_scale": torch.tensor([64.0])}))(
        folder
    )
    with pytest.warns(UserWarning, match="vLLM would take the largest"):
        compiled = fpcompiler.import_checkpoint(
            folder, model=Tiny(), example_inputs=torch.randn(3, K), target="reference"
        )
    within = [s for s in compiled.artifact.plan.steps if s.op == "fpc.quantize_within"]
    assert [
        float(compiled.artifact.tensors[compiled.artifact.plan.constants[s.args[1]["v"]]])
        for s in within
    ] == [2**-7, 2**-6]


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp6", "mxfp8", "modelopt"])
@pytest.mark.filterwarnings("ignore:.*vLLM would take the largest:UserWarning")
def test_a_model_of_the_users_own(kind: str, tmp_path: Path) -> None:
    folder = (
        write(tmp_path / "tiny", kind, is_static=False)
        if kind != "modelopt"
        else write(tmp_path / "tiny", kind)
    )
    model = Tiny()
    compiled = fpcompiler.import_checkpoint(
        folder, model=model, weights_only=True, target="reference"
    )
    x = torch.randn(5, K)
    got = compiled(x)  # captured by its first call
    layers = read_checkpoint(folder).layers
    for name in LAYERS:
        assert torch.equal(model.get_submodule(name).weight, layers[name].dequantized())
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-4)
    assert {row.name for row in compiled.plan().rows if row.quantized} == {*LAYERS}


def test_a_layer_that_the_config_promises_is_missed(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", "mxfp4")

    def plain(tensors: dict[str, Tensor]) -> None:
        del tensors["model.k_proj.weight_packed"], tensors["model.k_proj.weight_scale"]
        tensors["model.k_proj.weight"] = original("model.k_proj")

    edit_tensors(plain)(folder)
    with pytest.raises(CheckpointError, match=r"model.k_proj.weight'.*does not ignore it"):
        fpcompiler.import_checkpoint(folder, model=Tiny())
    edit_config(lambda config: config["ignore"].append("model.k_proj"))(folder)
    compiled = fpcompiler.import_checkpoint(folder, model=Tiny(), example_inputs=torch.randn(2, K))
    kept = {row.name: row.quantized for row in compiled.plan().rows}
    assert kept == {"model.q_proj": True, "model.k_proj": False}


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", "mxfp4")
    other = Tiny()
    other.model.q_proj = nn.Linear(K, N + 8)
    with pytest.raises(CheckpointError, match=r"model.q_proj.*\[128\].*\[136"):
        fpcompiler.import_checkpoint(folder, model=other)
    other.model.o_proj = nn.Linear(K, K)
    other.model.q_proj = nn.Linear(K, N)
    with pytest.raises(CheckpointError, match=r"checkpoint has no tensor 'model.o_proj"):
        fpcompiler.import_checkpoint(folder, model=other)


class Scaled(Tiny):
    """Multiplies a weight before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.norm(x)
        return nn.functional.linear(x, self.model.q_proj.weight * 3) * self.model.k_proj(x)


class Unused(Tiny):
    """Leaves a layer out."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model.q_proj(x)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Scaled(), "changes this weight before it multiplies|no codes of it"),
        (Unused(), "model.k_proj"),
    ],
)
def test_a_model_that_does_not_multiply_the_weights(
    model: nn.Module, why: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "tiny", "mxfp4")
    with pytest.raises(PassError, match=why):
        fpcompiler.import_checkpoint(folder, model=model, example_inputs=torch.randn(2, K))


def test_the_pass_alone_says_what_it_needs() -> None:
    with pytest.raises(PassError, match="fpcompiler import"):
        fpcompiler.compile(
            Tiny(),
            example_inputs=torch.randn(2, K),
            pipeline='cse,normalize,insert-quantize{scheme="mxfp4"},stored-weights',
        )


def test_swapped_nibbles_are_found_with_the_original(tmp_path: Path) -> None:
    folder, base = write(tmp_path / "tiny", "mxfp4"), write_original(tmp_path / "original")
    name = "model.q_proj.weight_packed"
    edit_tensors(lambda t: t.update({name: t[name] << 4 | t[name] >> 4}))(folder)
    fpcompiler.import_checkpoint(folder, model=Tiny())
    with pytest.raises(CheckpointError, match="nibbles are swapped"):
        fpcompiler.import_checkpoint(folder, model=Tiny(), original=base)


def test_a_quantized_cache_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(DATA / "modelopt-nvfp4", folder)
    edit_tensors(lambda t: t.update({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(())}))(
        folder
    )
    checkpoint = read_checkpoint(folder)
    assert checkpoint.notes == ("scales of the KV cache in the folder are left out",)
    assert not [name for name in checkpoint.plain if name.endswith("k_scale")]


def test_a_block_of_zeros_may_have_the_scale_zero(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny")

    def empty(tensors: dict[str, Tensor]) -> None:
        tensors["model.q_proj.weight_packed"][0, :8] = 0
        tensors["model.q_proj.weight_scale"].view(torch.uint8)[0, 0] = 0

    edit_tensors(empty)(folder)
    layer = read_checkpoint(folder).layers["model.q_proj"]
    assert int(layer.scale[0, 0]) == 1
    assert not layer.dequantized()[0, :16].any()


def test_a_model_of_transformers_may_be_given_in_another_dtype() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig.from_pretrained(DATA / "base", tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).float().eval()
    compiled = fpcompiler.import_checkpoint(
        DATA / "llmcompressor-mxfp4",
        model=model,
        weights_only=True,
        target="reference",
        example_kwargs={"input_ids": IDS},
    )
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


class Tied(Tiny):
    """Has one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(K, N, bias=False)
        self.head.weight = self.model.k_proj.weight


def test_a_tied_weight_has_no_tensor_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", "mxfp4")
    compiled = fpcompiler.import_checkpoint(folder, model=Tied(), example_inputs=torch.randn(2, K))
    assert {row.name for row in compiled.plan().rows if row.quantized} == {*LAYERS}
