"""The models of the golden dumps. Their lines are in the dumps: an edit here changes those."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Module):
    """Two linear layers and a head that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(functional.gelu(self.up(x)))
        return self.lm_head(x)


class Attention(nn.Module):
    """Self attention, whose q, k and v read one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.dropout(self.norm(x), 0.1, self.training)
        heads = [f(y).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


def tiny(kind: type[nn.Module]) -> nn.Module:
    """Return a model with fixed weights in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()
