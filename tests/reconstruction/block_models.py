"""Small models whose blocks are hard to find."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """``x + down(up(x))``."""

    def __init__(self, down: nn.Linear | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), down or nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class SharedDown(nn.Module):
    """Two blocks that share a layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        down = nn.Linear(64, 32)
        self.blocks = nn.ModuleList(Residual(down) for _ in range(2))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class JointBlock(nn.Module):
    """Two streams that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.x_in, self.y_in, self.x_out, self.y_out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.x_in(x), self.y_in(y)], 1)
        both = functional.scaled_dot_product_attention(both, both, both)
        ours, theirs = both.split([x.shape[1], y.shape[1]], 1)
        return x + self.x_out(ours), y + self.y_out(theirs)


class Joint(nn.Module):
    """Blocks of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock() for _ in range(2))
        self.out = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x[:, :3])
        for block in self.blocks:
            x, y = block(x, y)
        return self.out(x) + y.mean()


class LongSkipBlock(nn.Module):
    """A layer over two streams, and a residual sum after it that does not go past all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.block = nn.Linear(64, 32), Residual()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.skip(torch.cat([x, skip], -1))
        return x + self.block.down(torch.relu(self.block.up(x)))


class LongSkip(nn.Module):
    """As in Hunyuan-DiT: later blocks read what earlier ones gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual(), LongSkipBlock()])

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first), first)


class Joined(nn.Module):
    """As in Flux: a block joins its streams, then computes two things side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(96, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.cat([y, x], 1)
        return x + self.down(torch.cat([self.values(x), functional.gelu(self.up(x))], -1))


class ReadAgain(nn.Module):
    """As in diffusers' DiT: the head uses a part of the first block once more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joined(), Residual(), Residual()])
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x[:, :3])
        z = self.blocks[0](x, y)
        for block in self.blocks[1:]:
            z = block(z)
        return self.head(z * self.blocks[0].values(y).mean(1, keepdim=True))


def chain() -> nn.Module:
    """Return a list of modules without a residual sum."""
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(2)]
    return nn.Sequential(*layers)


def branches() -> nn.Module:
    """Return a plain model: a layer whose result nothing but a choice reads, and two more."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice, self.first, self.second = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.choice(x).argmax(-1, keepdim=True)
            return self.second(torch.relu(self.first(x)).gather(-1, chosen).expand_as(x) * x)

    return Branches()
