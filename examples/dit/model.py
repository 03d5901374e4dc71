"""A diffusion transformer for 28 x 28 pictures: DiT with adaLN-zero (arXiv 2212.09748)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are those of the weights in this folder.

    Attributes:
        side: Pixels of a side.
        patch: Pixels of the side of a patch, which is a token.
        width: Channels.
        depth: Blocks.
        heads: Heads of attention.
        classes: Classes of pictures; one more stands for none.
    """

    side: int = 28
    patch: int = 2
    width: int = 256
    depth: int = 6
    heads: int = 4
    classes: int = 10


class DiT(nn.Module):
    """Predicts the noise in pictures, given how noisy they are and what they show."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        config = config or Config()
        self.config = config
        width, pixels = config.width, config.patch**2
        self.embed = nn.Linear(pixels, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(config.classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, pixels)
        self.register_buffer("position", _positions(config.side // config.patch, width), False)
        for layer in (self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the noise in ``x``.

        Args:
            x: Noisy pictures ``[B, 1, side, side]``.
            t: Timesteps ``[B]``, 0 to 999.
            y: Classes ``[B]``; ``config.classes`` for none.
        """
        condition = functional.silu(self.time(t) + self.label(y))
        tokens = self.embed(self._patches(x)) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, dim=-1)
        tokens = self.final(self.final_norm(tokens) * (1 + scale) + shift)
        return self._picture(tokens)

    def _patches(self, x: Tensor) -> Tensor:
        """Return ``[B, tokens, patch * patch]``."""
        count, patch = self.config.side // self.config.patch, self.config.patch
        x = x.reshape(-1, count, patch, count, patch).permute(0, 1, 3, 2, 4)
        return x.reshape(-1, count * count, patch * patch)

    def _picture(self, tokens: Tensor) -> Tensor:
        """Undo :meth:`_patches`."""
        count, patch, side = (
            self.config.side // self.config.patch,
            self.config.patch,
            self.config.side,
        )
        x = tokens.reshape(-1, count, count, patch, patch).permute(0, 1, 3, 2, 4)
        return x.reshape(-1, 1, side, side)


class Block(nn.Module):
    """Attention and a feed-forward layer, scaled, shifted and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return tokens ``[B, tokens, width]`` for tokens, and a condition ``[B, width]``."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self._attention(self.norm1(x) * (1 + scale1) + shift1)
        hidden = functional.gelu(
            self.fc1(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh"
        )
        return x + gate2 * self.fc2(hidden)

    def _attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(mixed.transpose(1, 2).flatten(2))


class TimeEmbedding(nn.Module):
    """A vector for each timestep: sines and cosines, and two layers."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * frequencies, width), nn.Linear(width, width)
        rates = torch.exp(-math.log(10000) * torch.arange(frequencies) / frequencies)
        self.register_buffer("rates", rates, False)

    def forward(self, t: Tensor) -> Tensor:
        """Return ``[B, width]`` for timesteps ``[B]``."""
        angles = t[:, None].to(self.rates.dtype) * self.rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.second(functional.silu(self.first(waves)))


def _positions(count: int, width: int) -> Tensor:
    """Return sines and cosines of the row and column of each token, ``[count**2, width]``."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 4) / (width // 4))
    angles = torch.arange(count)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = waves[:, None].expand(-1, count, -1)
    columns = waves[None].expand(count, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(count * count, width)
