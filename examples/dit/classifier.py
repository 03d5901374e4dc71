"""A small classifier of the same pictures: what sampled ones show, and how real they look."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Classifier(nn.Module):
    """Three convolutions and two layers; the last but one has 128 features."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 32), (32, 64), (64, 128)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in sizes)
        self.hidden = nn.Linear(128 * 3 * 3, 128)
        self.head = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return ``[B, 128]`` for pictures ``[B, 1, 28, 28]`` in -1 to 1."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.max_pool2d(functional.relu(norm(convolution(x))), 2)
        return self.hidden(functional.dropout(x.flatten(1), 0.3, self.training))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 10]``."""
        return self.head(functional.relu(self.features(x)))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians with the means and covariances of features.

    ``|ma - mb|**2 + tr(Ca + Cb - 2 (Ca Cb)**0.5)``, as FID (arXiv 1706.08500), but of the features
    of this classifier.

    Args:
        a: ``[N, F]``.
        b: ``[M, F]``.
    """
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(difference.square().sum() + first.trace() + second.trace() - 2 * mixed)
