"""Diffusion transformers in the shapes of published ones, tiny and with random weights.

PixArt-alpha: one modulation for all blocks (adaLN-single) and cross-attention to captions.
PixArt-Sigma: with normalized queries and keys, and keys and values of fewer tokens.
Hunyuan-DiT: rotary positions, normalized queries and keys, a shift by the timestep, and long skips.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models import Call, merge_heads, normal, split_heads, timestep_embedding

WIDTH, HEADS, TEXT = 64, 4, 24


class Embedder(nn.Module):
    """Two linear layers with an activation between, for captions and timesteps."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class FeedForward(nn.Module):
    """GELU between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x), approximate="tanh"))


class Attention(nn.Module):
    """Attention to itself or to a context.

    Args:
        context: The width of the context.
        norm: Whether queries and keys are normalized.
        stride: Keys and values are those of this many times fewer rows and columns.
    """

    def __init__(self, context: int = WIDTH, norm: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, WIDTH) for n in (WIDTH, context, context))
        self.out = nn.Linear(WIDTH, WIDTH)
        norms = (nn.LayerNorm(WIDTH // HEADS) if norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms
        self.shrink = nn.Conv2d(WIDTH, WIDTH, stride, stride, groups=WIDTH) if stride > 1 else None

    def forward(
        self, x: Tensor, context: Tensor | None = None, angles: Tensor | None = None
    ) -> Tensor:
        context = x if context is None else context
        if self.shrink is not None:
            side = 4
            grid = context.transpose(1, 2).unflatten(2, (side, side))
            context = self.shrink(grid).flatten(2).transpose(1, 2)
        q = self.q_norm(split_heads(self.q(x), HEADS))
        k = self.k_norm(split_heads(self.k(context), HEADS))
        v = split_heads(self.v(context), HEADS)
        if angles is not None:
            q, k = _turned(q, angles), _turned(k, angles)
        return self.out(merge_heads(functional.scaled_dot_product_attention(q, k, v)))


class PixArtBlock(nn.Module):
    """Modulated attention and feed-forward, and attention to the caption between."""

    def __init__(self, sigma: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(6, WIDTH) * 0.1)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention(norm=sigma, stride=2 if sigma else 1)
        self.cross, self.mlp = Attention(norm=sigma), FeedForward()

    def forward(self, x: Tensor, modulation: Tensor, caption: Tensor) -> Tensor:
        parts = (self.table[None] + modulation.unflatten(1, (6, WIDTH))).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross(x, caption)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PixArt(nn.Module):
    """Latent [batch, 4, 8, 8], timestep, caption -> latent; ``sigma`` for PixArt-Sigma."""

    def __init__(self, sigma: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, WIDTH, 2, 2)
        self.time = Embedder(WIDTH, nn.SiLU())
        self.caption = Embedder(TEXT, nn.GELU(approximate="tanh"))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(PixArtBlock(sigma) for _ in range(depth))
        self.table = nn.Parameter(normal(2, WIDTH, seed=1) * 0.1)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.last = nn.Linear(WIDTH, 2 * 2 * 8)

    def forward(self, latent: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        x = self.patch(latent).flatten(2).transpose(1, 2)
        time, caption = self.time(timestep_embedding(timestep, WIDTH)), self.caption(caption)
        modulation = self.modulation(time)
        for block in self.blocks:
            x = block(x, modulation, caption)
        shift, scale = (self.table[None] + time[:, None]).chunk(2, dim=1)
        return _picture(self.last(self.norm(x) * (1 + scale) + shift))


class HunyuanBlock(nn.Module):
    """A shift by the condition, rotated attention, attention to the text, and a long skip."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skip_norm = nn.LayerNorm(2 * WIDTH) if skips else None
        self.skip = nn.Linear(2 * WIDTH, WIDTH) if skips else None
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.attention, self.cross = Attention(norm=True), Attention(TEXT, norm=True)
        self.mlp = FeedForward()

    def forward(
        self, x: Tensor, condition: Tensor, text: Tensor, angles: Tensor, skip: Tensor | None
    ) -> Tensor:
        if self.skip is not None and self.skip_norm is not None and skip is not None:
            x = self.skip(self.skip_norm(torch.cat([x, skip], -1)))
        shifted = self.norm1(x) + self.shift(functional.silu(condition))[:, None]
        x = x + self.attention(shifted, angles=angles)
        x = x + self.cross(self.norm2(x), text)
        return x + self.mlp(self.norm3(x))


class Hunyuan(nn.Module):
    """Latent [batch, 4, 8, 8], timestep, text, angles of the tokens' positions -> latent."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, WIDTH, 2, 2)
        self.time, self.pooled = Embedder(WIDTH, nn.SiLU()), Embedder(TEXT, nn.SiLU())
        self.pool = nn.MultiheadAttention(TEXT, 2, batch_first=True)
        self.blocks = nn.ModuleList(HunyuanBlock(skips=i == 2) for i in range(3))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * 2 * 8)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, angles: Tensor) -> Tensor:
        x = self.patch(latent).flatten(2).transpose(1, 2)
        pooled = self.pool(text.mean(1, keepdim=True), text, text, need_weights=False)[0][:, 0]
        condition = self.time(timestep_embedding(timestep, WIDTH)) + self.pooled(pooled)
        first = self.blocks[0](x, condition, text, angles, None)
        x = self.blocks[1](first, condition, text, angles, None)
        x = self.blocks[2](x, condition, text, angles, first)
        scale, shift = self.modulation(functional.silu(condition))[:, None].chunk(2, dim=-1)
        return _picture(self.last(self.norm(x) * (1 + scale) + shift))


def pixart_call(batch: int) -> Call:
    """Return the arguments of a call of :class:`PixArt`."""
    timestep = torch.arange(batch) * 300 + 50
    return (normal(batch, 4, 8, 8), timestep, normal(batch, 7, TEXT, seed=1)), {}


def hunyuan_call(batch: int) -> Call:
    """Return the arguments of a call of :class:`Hunyuan`."""
    args, _ = pixart_call(batch)
    return (*args, normal(16, WIDTH // HEADS, seed=2)), {}


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels: rotary positions."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return x * angles.cos() + turned * angles.sin()


def _picture(tokens: Tensor) -> Tensor:
    """Turn tokens of 2 x 2 patches into [batch, 8, 8, 8], the mean and the variance."""
    x = tokens.unflatten(2, (2, 2, 8)).unflatten(1, (4, 4))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
