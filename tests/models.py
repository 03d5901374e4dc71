"""Small models that the tests share: own networks here, Hugging Face ones in ``tests.hf_models``.

``cases()`` gives all of them by name. A case makes its model with fixed random weights, so two
calls give equal models, together with example inputs and further inputs of other shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a model."""

VOCABULARY = 96


@dataclass(frozen=True)
class Case:
    """A model with inputs.

    Attributes:
        name: What the case is called.
        make: Returns the model in eval mode, its example args and its example kwargs.
        other_inputs: Returns calls with other batch sizes and lengths, batch 1 among them where the
            model allows it.
        state: Whether a call changes buffers of the model (a KV cache).
    """

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    other_inputs: Callable[[], list[Call]]
    state: bool = False


def cases() -> dict[str, Case]:
    """Return every case by name, the Hugging Face ones included."""
    from tests.hf_models import hf_cases

    return own_cases() | hf_cases()


def own_cases() -> dict[str, Case]:
    """Return the cases that need nothing but torch."""
    return {case.name: case for case in _OWN}


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids of shape [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis."""

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (x * scale).to(x.dtype) * self.weight


def rotate(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Apply rotary position embeddings to [batch, heads, length, width]."""
    length, width = x.shape[-2:]
    inverse = theta ** -(torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * inverse
    cos, sin = (f.repeat(1, 2).to(x.dtype) for f in (angles.cos(), angles.sin()))
    half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * cos + half * sin


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn [batch, length, heads * width] into [batch, heads, length, width]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Turn [batch, heads, length, width] into [batch, length, heads * width]."""
    return x.transpose(1, 2).flatten(2)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, then a SwiGLU feed-forward."""

    def __init__(
        self, width: int = 64, heads: int = 4, kv_heads: int = 2, inner: int = 128
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        head_width = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.attention_norm, self.inner_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q = rotate(split_heads(self.q_proj(y), self.heads))
        k = rotate(split_heads(self.k_proj(y), self.kv_heads))
        v = split_heads(self.v_proj(y), self.kv_heads)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(merge_heads(attended))
        y = self.inner_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """A decoder-only language model: token ids [batch, length] -> logits."""

    def __init__(self, layers: int = 2, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(LlamaBlock(width) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class ViTBlock(nn.Module):
    """Pre-norm self attention and GELU feed-forward."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(merge_heads(functional.scaled_dot_product_attention(q, k, v)))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """An image classifier: pixels [batch, 3, 32, 32] -> logits."""

    def __init__(self, layers: int = 2, width: int = 64, image: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Return sinusoidal features [batch, width] of diffusion timesteps [batch]."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep[:, None].float() * torch.exp(-math.log(10000) * index / half)
    return torch.cat([angles.cos(), angles.sin()], -1)


class DiTBlock(nn.Module):
    """Self attention, cross attention and feed-forward, modulated by adaLN-zero."""

    def __init__(self, width: int = 64, heads: int = 4, context: int = 48) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(context, 2 * width)
        self.cross_proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, context: Tensor) -> Tensor:
        parts = self.modulation(condition)[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(y).chunk(3, -1))
        x = x + gate1 * self.proj(merge_heads(functional.scaled_dot_product_attention(q, k, v)))
        q = split_heads(self.cross_q(self.norm2(x)), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.cross_kv(context).chunk(2, -1))
        x = x + self.cross_proj(merge_heads(functional.scaled_dot_product_attention(q, k, v)))
        y = self.norm3(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(functional.gelu(self.fc1(y), approximate="tanh"))


class DiT(nn.Module):
    """A diffusion transformer: latent [batch, 4, h, w], timestep, text context -> latent."""

    def __init__(self, layers: int = 2, width: int = 64, patch: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.width, self.patch_size, self.channels = width, patch, channels
        self.patch = nn.Conv2d(channels, width, patch, patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(layers))
        self.out = nn.Linear(width, patch * patch * channels)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        x = self.patch(latent)
        batch, _, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2)
        condition = self.time(timestep_embedding(timestep, self.width))
        for block in self.blocks:
            x = block(x, condition, context)
        size = self.patch_size
        x = self.out(x).view(batch, rows, columns, size, size, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            batch, self.channels, rows * size, columns * size
        )


class CachedAttention(nn.Module):
    """Attention over a KV cache in buffers, written at the given positions."""

    def __init__(self, width: int = 64, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        for name in ("k_cache", "v_cache"):
            cache = torch.zeros(1, heads, length, width // heads)
            self.register_buffer(name, cache, persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        self.k_cache.index_copy_(2, position, k)
        self.v_cache.index_copy_(2, position, v)
        mask = torch.arange(self.k_cache.shape[2]) <= position[:, None]
        attended = functional.scaled_dot_product_attention(
            q, self.k_cache, self.v_cache, attn_mask=mask
        )
        return self.out(merge_heads(attended))


class SharedBlock(nn.Module):
    """One block called twice, with a linear of its own between."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.block, self.between = ViTBlock(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.tanh(self.between(self.block(x))))


class TiedLanguageModel(nn.Module):
    """A language model whose output head is its embedding table."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.block = LlamaBlock(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.block(self.embed(ids)))


def _case(
    name: str, build: Callable[[], nn.Module], *calls: Callable[[], Call], state: bool = False
) -> Case:
    def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build().eval()
        return model, *calls[0]()

    return Case(name, make, lambda: [call() for call in calls[1:]], state)


def _ids(batch: int, length: int) -> Callable[[], Call]:
    return lambda: ((token_ids(batch, length),), {})


def _hidden(batch: int, length: int) -> Callable[[], Call]:
    return lambda: ((normal(batch, length, 64),), {})


def _pixels(batch: int) -> Callable[[], Call]:
    return lambda: ((normal(batch, 3, 32, 32),), {})


def _latent(batch: int, context: int) -> Callable[[], Call]:
    def call() -> Call:
        timestep = torch.arange(batch) * 7 + 3
        inputs = {"timestep": timestep, "context": normal(batch, context, 48, seed=1)}
        return (normal(batch, 4, 8, 8),), inputs

    return call


def _cached(first: int, last: int) -> Callable[[], Call]:
    return lambda: ((normal(1, last - first, 64, seed=first), torch.arange(first, last)), {})


_OWN = (
    _case("llama", Llama, _ids(2, 12), _ids(1, 12), _ids(3, 7), _ids(2, 1)),
    _case("vit", ViT, _pixels(2), _pixels(1), _pixels(5)),
    _case("dit", DiT, _latent(2, 7), _latent(1, 7), _latent(3, 11)),
    _case("cached", CachedAttention, _cached(0, 4), _cached(4, 6), _cached(6, 7), state=True),
    _case("shared", SharedBlock, _hidden(2, 12), _hidden(1, 12), _hidden(3, 5)),
    _case("tied", TiedLanguageModel, _ids(2, 12), _ids(1, 12), _ids(3, 7)),
)
