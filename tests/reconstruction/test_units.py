"""Units found in graphs of many models: blocks where there are, and what holds for all of them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fpcompiler.capture import capture
from fpcompiler.reconstruction import Unit, find_units
from fpcompiler.reconstruction.subgraph import UnitFunction
from fpcompiler.streams import Segments
from tests import diffusers_models, dit_models
from tests.calibration.runs import CPU
from tests.models import cases, normal, token_ids
from tests.programs import leaves_of
from tests.reconstruction.block_models import (
    Joint,
    LongSkip,
    ReadAgain,
    SharedDown,
    branches,
    chain,
)
from tests.reconstruction.graphs import Builder, aten, learnable, values_of


def transformers_model(kind: str, auto: str, call: dict[str, Any], **config: Any) -> Any:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = transformers.AutoConfig.for_model(kind, **config)
        return getattr(transformers, auto).from_config(built).eval(), (), call


def swin() -> Any:
    return transformers_model(
        "swin", "AutoModelForImageClassification", {"pixel_values": normal(2, 3, 32, 32)},
        image_size=32, patch_size=4, embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=4,
    )  # fmt: skip


def albert() -> Any:
    return transformers_model(
        "albert", "AutoModel", {"input_ids": token_ids(2, 12)}, vocab_size=96, embedding_size=32,
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    )  # fmt: skip


def t5() -> Any:
    call = {"input_ids": token_ids(2, 12), "decoder_input_ids": token_ids(2, 6)}
    return transformers_model(
        "t5", "AutoModelForSeq2SeqLM", call, vocab_size=96, d_model=64, d_kv=16, d_ff=128,
        num_layers=1, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip


def small(build: Callable[[], nn.Module], *shape: int) -> Callable[[], Any]:
    def make() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval(), (normal(*shape),), {}

    return make


Made = Callable[[], Any]
QUICK = (
    "llama", "shared", "cached", "pixart", "long skip", "two streams",
    "shared layer", "read again", "chain", "branches",
)  # fmt: skip
MODELS: dict[str, tuple[Made, dict[str, int]]] = {
    "llama": (cases()["llama"].make, {"layers.0": 7, "layers.1": 7, "lm_head": 1}),
    "vit": (cases()["vit"].make, {"patch": 1, "blocks.0": 4, "blocks.1": 4, "head": 1}),
    "dit": (
        cases()["dit"].make,
        {"patch": 1, "time.0": 1, "time.2": 1, "blocks.0": 8, "blocks.1": 8, "out": 1},
    ),
    "cached": (cases()["cached"].make, {"qkv": 1, "out": 1}),
    "shared": (cases()["shared"].make, {"block": 5}),
    "tied": (cases()["tied"].make, {"block": 7, "lm_head": 1}),
    "hf-llama": (
        cases()["hf-llama"].make, {"model.layers.0": 7, "model.layers.1": 7, "lm_head": 1},
    ),
    "hf-mixtral": (
        cases()["hf-mixtral"].make, {"model.layers.0": 5, "model.layers.1": 5, "lm_head": 1},
    ),
    "hf-gpt2": (
        cases()["hf-gpt2"].make, {"transformer.h.0": 4, "transformer.h.1": 4, "lm_head": 1},
    ),
    "hf-bert": (
        cases()["hf-bert"].make, {"encoder.layer.0": 6, "encoder.layer.1": 6, "pooler.dense": 1},
    ),
    "hf-whisper": (
        cases()["hf-whisper"].make,
        {
            "model.encoder.conv1": 1, "model.encoder.conv2": 1, "model.encoder.layers.0": 6,
            "model.encoder.layers.1": 6, "model.decoder.layers.0": 10,
            "model.decoder.layers.1": 10, "proj_out": 1,
        },
    ),
    "decoder-gpt2": (
        cases()["decoder-gpt2"].make,
        {"model.transformer.h.0": 4, "model.transformer.h.1": 4, "model.lm_head": 1},
    ),
    "swin": (
        swin,
        {
            "swin.embeddings.patch_embeddings.projection": 1,
            "swin.encoder.layers.0.blocks.0": 6, "swin.encoder.layers.0": 1,
            "swin.encoder.layers.1.blocks.0": 6, "swin.encoder.layers.1.blocks.1": 6,
            "classifier": 1,
        },
    ),
    "albert": (
        albert,
        {
            "encoder.embedding_hidden_mapping_in": 1,
            "encoder.albert_layer_groups.0.albert_layers.0": 6, "pooler": 1,
        },
    ),
    "pixart": (
        lambda: (dit_models.PixArt().eval(), *dit_models.pixart_call(2)),
        {
            "patch": 1, "time.first": 1, "time.second": 1, "caption.first": 1, "caption.second": 1,
            "modulation.1": 1, "blocks.0": 10, "blocks.1": 10, "last": 1,
        },
    ),
    "long skip": (small(LongSkip, 4, 32), {"blocks.0": 2, "blocks.1": 2, "blocks.2": 3}),
    "two streams": (small(Joint, 2, 5, 32), {"blocks.0": 4, "blocks.1": 4, "out": 1}),
    "shared layer": (small(SharedDown, 4, 32), {"blocks.0": 1, "blocks.1": 1, "head": 1}),
    "read again": (
        small(ReadAgain, 2, 5, 32), {"blocks.0": 3, "blocks.1": 2, "blocks.2": 2, "head": 1},
    ),
    "chain": (small(chain, 4, 32), {"0.0": 1, "0.2": 1, "1.0": 1, "1.2": 1}),
    "branches": (small(branches, 4, 32), {"choice": 1, "first": 1, "second": 1}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_the_blocks_of_models_are_their_units(name: str, captured: Any) -> None:
    make, wanted = MODELS[name]
    made = captured(name) if name in cases() else None
    model, args, kwargs = make()
    made = made or capture(model, args, kwargs)
    module, _ = learnable(made)
    units = check(module, leaves_of(made, (args, kwargs)))
    assert {unit.name: len(unit.weights) for unit in units} == wanted


@pytest.mark.slow
def test_layers_of_t5() -> None:
    model, args, kwargs = t5()
    made = capture(model, args, kwargs)
    module, _ = learnable(made)
    units = check(module, leaves_of(made, (args, kwargs)))
    assert [len(unit.weights) for unit in units] == [4, 2, 4, 4, 2, 1]
    assert units[3].name == "decoder.block.0.layer.1"


@pytest.mark.slow
@pytest.mark.parametrize("name", diffusers_models.CONFIGS)
def test_diffusers(name: str) -> None:
    pytest.importorskip("diffusers")
    model = diffusers_models.diffusers_model(name)
    kwargs = diffusers_models.diffusers_call(name)
    made = capture(model, (), kwargs)
    module, layers = learnable(made)
    units = check(module, leaves_of(made, ((), kwargs)))
    blocks = [unit for unit in units if "blocks." in unit.name]
    assert len(blocks) >= 2
    assert len(units) < len(layers) // 2


def check(module: fx.GraphModule, inputs: list[Tensor]) -> list[Unit]:
    """Check what is true of the units of every graph, and return them."""
    names = [name for name, _ in module.named_buffers() if name.startswith("weight")]
    units = find_units(module.graph, names)
    weights = [name for unit in units for name in unit.weights]
    assert len(set(weights)) == len(weights)
    assert len({unit.name for unit in units}) == len(units)
    nodes = [node for unit in units for node in unit.nodes]
    assert len(set(nodes)) == len(nodes)
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    first = [position[unit.nodes[0]] for unit in units]
    assert first == sorted(first)
    for unit in units:
        assert unit.outputs
        assert set(unit.outputs) <= set(unit.nodes)
        assert not set(unit.inputs) & set(unit.nodes)
    require_reproduced(module, units, inputs)
    require_weights_in_time(module, units, inputs)
    return units


def require_reproduced(module: fx.GraphModule, units: list[Unit], inputs: list[Tensor]) -> None:
    """A unit on its own gives what it gives in the graph, bit for bit."""
    whole = copy.deepcopy(module)  # running it writes to its buffers
    found = {node.name: value for node, value in values_of(whole, inputs).items()}
    for unit in units:
        function = UnitFunction(module, unit, CPU, frozenset())
        wanted = function.joined([found[node.name] for node in unit.outputs])
        weights = [getattr(module, name).float() for name in unit.weights]
        given = tuple(found[node.name] for node in unit.inputs)
        assert torch.equal(function(weights, given), wanted), unit.name


def require_weights_in_time(
    module: fx.GraphModule, units: list[Unit], inputs: list[Tensor]
) -> None:
    """The piece of a unit is the first to read its weights: before, they are not learned yet."""
    piece_of = {name: number for number, unit in enumerate(units) for name in unit.weights}
    piece = 0

    class Guarded(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            assert piece_of[name] <= piece
            return getattr(module, name)

        def __contains__(self, name: object) -> bool:
            return name in piece_of

        def __iter__(self) -> Any:
            return iter(piece_of)

        def __len__(self) -> int:
            return len(piece_of)

    pieces = [[*unit.inputs, *unit.outputs] for unit in units]
    segments = Segments(module, pieces, CPU, weights=Guarded())
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    left = dict(zip(names, inputs, strict=True))
    for piece in range(len(units)):
        left = segments.run(piece, left, {})


def test_nodes_without_paths_are_units_each() -> None:
    build = Builder()
    x = build.input()
    y = build.linear("", x, torch.eye(4), "")
    module = build.module(build.call("", aten.add.Tensor, x, build.linear("", y, torch.eye(4), "")))
    units = check(module, [normal(3, 4)])
    assert [unit.name for unit in units] == ["weight0", "weight1"]


def test_a_sum_of_what_no_weight_computes_makes_no_block() -> None:
    build = Builder()
    ids = build.input("ids")
    offset = build.call("model.0", aten.neg.default, ids)
    positions = build.call("model.0", aten.add.Tensor, ids, offset)
    y = build.linear("model.0.up", positions, torch.eye(4), "")
    z = build.linear("model.0.down", y, torch.eye(4), "")
    units = check(build.module(z), [normal(3, 4)])
    assert [unit.name for unit in units] == ["model.0.up", "model.0.down"]


def test_a_layer_that_only_blocks_share_is_in_none() -> None:
    build = Builder()
    x = build.input()
    build.root.register_buffer("weight0", torch.eye(4))
    weight = build.graph.get_attr("weight0")
    for name in ("one", "other"):
        y = build.call(f"{name}.fc", aten.linear.default, x, weight)
        x = build.call(name, aten.add.Tensor, x, y)
    assert find_units(build.module(x).graph, {"weight0"}) == []


def test_what_is_taken_out_of_a_list_later_belongs_to_the_unit() -> None:
    build = Builder()
    x = build.input()
    y = build.linear("block.qkv", x, normal(8, 4), "")
    parts = build.call("block", aten.chunk.default, y, 2, -1)
    z = build.linear("block.other", build.call("block", aten.relu.default, x), torch.eye(4), "")
    z = build.call("block", aten.add.Tensor, x, z)
    parts = build.call("block", aten.chunk.default, y, 2, -1)
    after = build.call("", aten.relu.default, z)
    taken = [build.call("", operator.getitem, parts, i) for i in range(2)]
    (unit,) = check(build.module(after, *taken), [normal(3, 4)])
    assert unit.name == "block"
    assert unit.outputs == (z, *taken)
