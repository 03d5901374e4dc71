"""Roles: what each layer of every test model is, and what only looks like a role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler import ir
from fpcompiler.capture import CapturedProgram
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.passes.roles import layer_roles
from fpcompiler.scheme import Role
from tests import diffusers_models, dit_models
from tests.models import LlamaBlock, ViTBlock, merge_heads, normal, split_heads
from tests.programs import Function, import_named, program_of, quantized, run_passes


def roles_of(program: ir.Program) -> dict[str, str]:
    run_passes(program, "cse,normalize,fold-constants")
    return {name: str(role) for name, role in layer_roles(program).items()}


def roles(model: nn.Module, *args: Tensor) -> dict[str, str]:
    return roles_of(program_of(model, *args))


def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*(x @ w for w in (q, k, v)))


def by_last_name(found: dict[str, str]) -> dict[str, set[str]]:
    """Return the last part of the names of the layers of each role."""
    parts: dict[str, set[str]] = {}
    for name, role in found.items():
        parts.setdefault(role, set()).add(name.rpartition(".")[2])
    return parts


MODELS = {
    "llama": {
        "embedding": {"embed"}, "qkv": {"q_proj", "k_proj", "v_proj"}, "attention-out": {"o_proj"},
        "ffn-in": {"gate_proj", "up_proj"}, "ffn-out": {"down_proj"}, "head": {"lm_head"},
    },
    "vit": {
        "embedding": {"patch"}, "qkv": {"qkv"}, "attention-out": {"proj"}, "ffn-in": {"fc1"},
        "ffn-out": {"fc2"}, "head": {"head"},
    },
    "dit": {
        "embedding": {"patch", "0", "2"}, "modulation": {"1"},
        "qkv": {"qkv", "cross_q", "cross_kv"},
        "attention-out": {"proj", "cross_proj"}, "ffn-in": {"fc1"}, "ffn-out": {"fc2"},
        "head": {"out"},
    },
    "cached": {"qkv": {"qkv"}, "attention-out": {"out"}},
    "shared": {
        "qkv": {"qkv"}, "attention-out": {"proj"}, "ffn-in": {"fc1"}, "ffn-out": {"fc2"},
        "other": {"between"},
    },
    "hf-bert": {
        "embedding": {"word_embeddings", "token_type_embeddings", "position_embeddings"},
        "qkv": {"query", "key", "value"}, "head": {"dense"},
    },
    "hf-gpt2": {
        "embedding": {"wte", "wpe"}, "qkv": {"c_attn"}, "attention-out": {"c_proj"},
        "ffn-in": {"c_fc"}, "ffn-out": {"c_proj"}, "head": {"lm_head"},
    },
    "hf-mixtral": {
        "embedding": {"embed_tokens"}, "qkv": {"q_proj", "k_proj", "v_proj"}, "other": {"gate"},
        "attention-out": {"o_proj"}, "ffn-in": {"transpose"}, "ffn-out": {"transpose"},
        "head": {"lm_head"},
    },
    "hf-whisper": {
        "embedding": {"conv1", "conv2", "embed_tokens"}, "qkv": {"q_proj", "k_proj", "v_proj"},
        "attention-out": {"out_proj"}, "ffn-in": {"fc1"}, "ffn-out": {"fc2"}, "head": {"proj_out"},
    },
}  # fmt: skip
"""The last parts of the names of the layers of each role."""


@pytest.mark.parametrize("name", MODELS)
def test_the_roles_of_models(name: str, captured: Callable[[str], CapturedProgram]) -> None:
    found = roles_of(import_named(captured(name)))
    parts = by_last_name(found)
    if name == "hf-bert":  # three of its roles are called dense
        assert found["encoder.layer.1.attention.output.dense"] == "attention-out"
        assert found["encoder.layer.1.intermediate.dense"] == "ffn-in"
        assert found["encoder.layer.1.output.dense"] == "ffn-out"
        parts = {role: parts[role] for role in MODELS[name]}
    assert parts == MODELS[name]


PIXART = {"embedding": 5, "modulation": 1, "qkv": 12, "attention-out": 4, "ffn-in": 2,
          "ffn-out": 2, "head": 1}  # fmt: skip
PUBLISHED = {
    "alpha": (lambda: dit_models.PixArt(), dit_models.pixart_call, PIXART),
    "sigma": (
        # The convolutions that shorten keys and values have no role.
        lambda: dit_models.PixArt(sigma=True), dit_models.pixart_call, PIXART | {"other": 2},
    ),
    "hunyuan": (
        # The long skip has none either; the pooled text is part of the condition, through an
        # attention whose projections of queries and of keys and values are parts of one tensor.
        lambda: dit_models.Hunyuan(), dit_models.hunyuan_call,
        {"embedding": 8, "modulation": 4, "qkv": 18, "attention-out": 6, "ffn-in": 3,
         "ffn-out": 3, "head": 1, "other": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_fp4dit_on_diffusion_transformers_of_published_shapes(name: str) -> None:
    build, call, expected = PUBLISHED[name]
    torch.manual_seed(0)
    model = build().eval()
    compiled = fpcompiler.compile(model, "fp4dit", example_inputs=call(2)[0])
    rows = compiled.plan().rows
    assert Counter(row.role for row in rows) == expected
    for row in rows:
        kept = row.role in ("modulation", "embedding", "head") or row.name.endswith("shrink")
        ffn_in = row.role == "ffn-in"
        assert row.quantized is not kept
        assert kept or row.weight == f"{'f4E3M0FN' if ffn_in else 'f4E2M1FN'}@block128:f32"
        assert kept or row.activation == "f6E2M3FN@token:f32"
    args = call(1)[0]
    with torch.no_grad():
        expected_output = model(*args)
    error = (compiled(*args) - expected_output).norm() / expected_output.norm()
    assert float(error) < 0.3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers and what it imports warn of themselves
@pytest.mark.parametrize("name", diffusers_models.CONFIGS)
def test_fp4dit_on_models_of_diffusers(name: str) -> None:
    pytest.importorskip("diffusers")
    model, call = diffusers_models.diffusers_model(name), diffusers_models.diffusers_call(name)
    compiled = fpcompiler.compile(model, "fp4dit", example_kwargs=call)
    rows = compiled.plan().rows
    for row in rows:
        inner = ("norm", "norm1", "norm1_context", "norm_out", "adaln_single")
        parts = row.name.split(".")
        is_modulation = (parts[-1] == "linear" and parts[-2] in inner) or row.name == "proj_out_1"
        is_first = row.name.endswith(("net.0.proj", "proj_mlp"))
        assert (row.role == "modulation") is is_modulation, row.name
        assert (row.role == "ffn-in") is is_first, row.name
        assert ("f4E3M0FN" in row.weight) is is_first, row.name
        assert (row.role == "qkv") is (parts[-1] in QKV and "pooler" not in parts), row.name
    assert [row.role for row in rows][-1] == "head"
    with torch.no_grad():
        expected = model(**call)[0]
    assert float((compiled(**call)[0] - expected).norm() / expected.norm()) < 0.2


QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def test_a_shared_layer_has_one_role_and_the_plan_shows_it() -> None:
    compiled = fpcompiler.compile(ViTBlock().eval(), "w4a6", example_inputs=normal(2, 5, 64))
    shown = {row.name: row.role for row in compiled.plan().rows}
    assert shown == {"qkv": "qkv", "proj": "attention-out", "fc1": "ffn-in", "fc2": "ffn-out"}
    assert "attention-out" in str(compiled.plan())
    assert {row["role"] for row in compiled.plan().to_json()["rows"]} == set(shown.values())


def test_roles_are_marked_on_kept_and_quantized_layers() -> None:
    program = quantized(LlamaBlock(), normal(1, 4, 64), scheme="w4a6; role:qkv: skip")
    marks = {
        text_of(op.attributes["fpq.layer"]): text_of(op.attributes["fpq.role"])
        for op in program.operations()
        if "fpq.layer" in op.attributes
    }
    assert marks["q_proj"] == "qkv"
    assert marks["down_proj"] == "ffn-out"
    kept = {n for n in marks if n not in linears(program)}
    assert kept == {"q_proj", "k_proj", "v_proj"}


def linears(program: ir.Program) -> set[str]:
    return {text_of(op.attributes["layer"]) for op in program.operations("fpq.linear")}


def test_roles_need_no_names_of_modules() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        x = x + attention(x, m.a, m.b, m.c) @ m.d
        return x + functional.gelu(x @ m.e) @ m.f

    weights = {name: normal(8, 8, seed=i) for i, name in enumerate("abcdef")}
    assert roles(Function(block, **weights), normal(2, 5, 8)) == {
        "a": "qkv", "b": "qkv", "c": "qkv", "d": "attention-out", "e": "ffn-in", "f": "ffn-out",
    }  # fmt: skip


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": torch.relu,
    "swish": lambda x: x * torch.sigmoid(x),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "erf": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.0447 * torch.pow(x, 3)))),
    "squared relu": lambda x: torch.relu(x) ** 2,
    "geglu": lambda x: x[..., :4].repeat(1, 1, 2) * functional.gelu(x[..., 4:].repeat(1, 1, 2)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_fused_or_spelled_out(name: str) -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        return x + ACTIVATIONS[name](x @ m.up) @ m.down

    found = roles(Function(block, up=normal(8, 8), down=normal(8, 8)), normal(2, 5, 8))
    assert found == {"up": "ffn-in", "down": "ffn-out"}


NOT_FFN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no activation": lambda m, x: x + (x @ m.up) @ m.down,
    "tanh alone": lambda m, x: x + torch.tanh(x @ m.up) @ m.down,
    "sigmoid of another layer": lambda m, x: x + (torch.sigmoid(x @ m.up) * x) @ m.down,
    "a residual sum between": lambda m, x: (x + functional.gelu(x @ m.up)) @ m.down,
}


@pytest.mark.parametrize("name", NOT_FFN)
def test_what_is_no_feed_forward(name: str) -> None:
    found = roles(Function(NOT_FFN[name], up=normal(8, 8), down=normal(8, 8)), normal(2, 5, 8))
    assert "ffn-in" not in found.values()


def test_attention_spelled_out() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        q, k, v = (split_heads(x @ w, 2) for w in (m.q, m.k, m.v))
        scores = q @ k.transpose(-1, -2) / 2
        scores = torch.tanh(scores / 30) * 30 + torch.arange(x.shape[1])  # capped, with positions
        return x + merge_heads(torch.softmax(scores, -1) @ v) @ m.out

    weights = {name: normal(8, 8, seed=i) for i, name in enumerate(("q", "k", "v", "out"))}
    found = roles(Function(block, **weights), normal(2, 5, 8))
    assert found == {"q": "qkv", "k": "qkv", "v": "qkv", "out": "attention-out"}


def test_a_product_of_activations_without_softmax_is_no_attention() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        return x + (x @ m.q) @ (x @ m.k).transpose(-1, -2) @ (x @ m.v)

    weights = {name: normal(8, 8, seed=i) for i, name in enumerate("qkv")}
    assert set(roles(Function(block, **weights), normal(2, 5, 8)).values()) == {"other"}


def test_layers_without_a_block_are_neither_first_nor_last() -> None:
    found = roles(Function(lambda m, x: x @ m.w, w=normal(8, 8)), normal(2, 8))
    assert found == {"w": "other"}
    mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert roles(mlp, normal(2, 8)) == {"0": "ffn-in", "2": "ffn-out"}


class Conditioned(nn.Module):
    """A block that a function of the tokens and of a condition changes."""

    def __init__(self, change: Callable[..., Tensor], outputs: int) -> None:
        super().__init__()
        self.change, self.condition = change, nn.Linear(8, outputs)
        self.norm, self.block, self.last = nn.LayerNorm(8), ViTBlock(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + 0.1 * self.block(x)
        return self.last(self.block(self.change(self, x, c)))


CONDITIONS: dict[str, tuple[Callable[..., Tensor], int, Role]] = {
    "scale": (lambda m, x, c: m.norm(x) * (1 + m.condition(c)[:, None]), 8, Role.MODULATION),
    "gate of a branch": (
        lambda m, x, c: x + m.condition(c)[:, None].tanh() * m.block(x), 8, Role.MODULATION,
    ),
    "shift after a norm": (
        lambda m, x, c: m.norm(x) + m.condition(c)[:, None], 8, Role.MODULATION,
    ),
    "a vector added to tokens": (
        lambda m, x, c: x + m.condition(c)[:, None], 8, Role.EMBEDDING,
    ),
    "a gate computed from the tokens": (
        lambda m, x, c: x * torch.sigmoid(m.condition(x.mean(1)))[:, None], 8, Role.OTHER,
    ),
    "one factor for each token": (
        lambda m, x, c: x * m.condition(x).sigmoid(), 1, Role.OTHER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_modulation_and_what_looks_like_it(name: str) -> None:
    change, outputs, role = CONDITIONS[name]
    found = roles(Conditioned(change, outputs), normal(2, 5, 8), normal(2, 8))
    assert found["condition"] == role
    assert found["last"] == Role.HEAD
