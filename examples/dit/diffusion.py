"""Noise, and sampling without it: a cosine schedule, DDIM, and classifier-free guidance.

Schedule: arXiv 2102.09672, equation 17. Sampler: DDIM (arXiv 2010.02502), no noise added.
Guidance: arXiv 2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

STEPS = 1000
"""Timesteps of the schedule."""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From noisy pictures, timesteps and classes to the noise."""


def signal(t: Tensor) -> Tensor:
    """Return how much of the variance at timesteps (0 to 999) is the picture's, fp32."""
    angle = (t.double() + 1) / STEPS
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    kept = torch.cos((angle + 0.008) / 1.008 * math.pi / 2) ** 2 / start
    return kept.clamp(1e-5, 1.0).float()


def add_noise(pictures: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return pictures ``[B, 1, H, W]`` at timesteps ``[B]``."""
    kept = signal(t)[:, None, None, None]
    return kept.sqrt() * pictures + (1 - kept).sqrt() * noise


def sampling_timesteps(count: int) -> list[int]:
    """Return the timesteps that a sampler with so many steps visits, the noisiest first."""
    return [round((STEPS - 1) * (count - i) / count) for i in range(count)]


@torch.no_grad()
def trajectory(
    predict: Predict, noise: Tensor, labels: Tensor, *, steps: int, guidance: float, none: int
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Sample pictures, and yield what happens at each step.

    Args:
        predict: The model.
        noise: Where to start ``[B, 1, H, W]``.
        labels: Classes ``[B]``.
        steps: How many.
        guidance: How far to go from the prediction without a class beyond that with one; 1 is the
            latter.
        none: The label that stands for no class.

    Yields:
        The arguments of the model's call (with and without the class: ``2 B`` pictures), and the
        pictures that it is the noise of, as the model sees them now.
    """
    x, visited = noise, sampling_timesteps(steps)
    both = torch.cat([labels, torch.full_like(labels, none)])
    for t, after in zip(visited, [*visited[1:], -1], strict=True):
        call = (torch.cat([x, x]), torch.full_like(both, t), both)
        given, without = predict(*call).chunk(2)
        error = without + guidance * (given - without)
        now, then = (signal(torch.tensor(step)).to(x.device) for step in (t, after))
        clean = ((x - (1 - now).sqrt() * error) / now.sqrt()).clamp(-1, 1)
        # What is clipped is no noise.
        error = (x - now.sqrt() * clean) / (1 - now).sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * error
        yield call, clean


def sample(
    predict: Predict,
    labels: Tensor,
    *,
    steps: int = 50,
    guidance: float = 2.0,
    none: int = 10,
    seed: int = 0,
    side: int = 28,
) -> Tensor:
    """Return pictures ``[B, 1, side, side]`` in -1 to 1, of the classes ``[B]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 1, side, side, generator=generator).to(labels.device)
    path = trajectory(predict, noise, labels, steps=steps, guidance=guidance, none=none)
    return [clean for _, clean in path][-1]
