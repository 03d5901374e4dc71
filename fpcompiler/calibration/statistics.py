"""What is kept of a layer's input while calibration data streams through the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer


@dataclass(frozen=True)
class InputStatistics:
    """The input of a layer over all calibration data.

    Attributes:
        tokens: How many rows were seen.
        amax: fp32 ``[K]``, the largest magnitude of each channel.
        gram: fp32 ``[K, K]``, the sum of ``x^T x`` over all tokens; the Hessian of GPTQ.
        sample: ``[S, K]`` in the dtype of the input, tokens drawn without replacement.
    """

    tokens: int
    amax: Tensor
    gram: Tensor
    sample: Tensor

    def divided(self, powers: Tensor) -> InputStatistics:
        """Return the statistics of the input with channel ``j`` divided by ``powers[j]``, exactly.

        Args:
            powers: Powers of two, ``[K]``.
        """
        factor = powers.to(self.gram.device, torch.float32)
        return InputStatistics(
            self.tokens,
            self.amax / factor,
            self.gram / factor / factor[:, None],
            (self.sample.float() / factor).to(self.sample.dtype),
        )


class Accumulator:
    """Collects the statistics of one input.

    Args:
        k: Channels.
        seed: Of the draw; together with the number of the batch it decides which tokens.
        device: Where the sums are kept.
    """

    def __init__(self, k: int, seed: int, device: torch.device) -> None:
        self._amax = torch.zeros(k, device=device)
        self._gram = torch.zeros(k, k, device=device)
        self._samples: list[Tensor] = []
        self._seed = seed
        self._tokens = 0

    @staticmethod
    def bytes(k: int, tokens: int) -> int:
        """Return the memory that an accumulator of ``tokens`` sampled tokens needs."""
        return 4 * (k * k + k + tokens * k)

    def add(self, x: Tensor, batch: int, quota: int, name: str) -> None:
        """Add one batch.

        Args:
            x: ``[..., K]``.
            batch: Its number.
            quota: Tokens to draw from it; all of them if it has fewer.
            name: Of the layer, for errors.

        Raises:
            NumericsError: If it holds NaN or infinity.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        wide = rows.to(torch.float32)
        amax = wide.abs().amax(0) if len(rows) else torch.zeros_like(self._amax)
        if not bool(amax.isfinite().all()):
            raise NumericsError(
                f"{describe_layer(name)}: its input holds NaN/Inf for calibration batch "
                f"{batch + 1}. Run the original model on that batch to see where they begin: in "
                "the batch, or with the weight of a layer before."
            )
        torch.maximum(self._amax, amax, out=self._amax)
        self._gram.addmm_(wide.T, wide)
        self._tokens += len(rows)
        self._samples.append(rows[draw(len(rows), quota, self._seed, batch).to(rows.device)])

    @property
    def tokens(self) -> int:
        """How many rows were seen."""
        return self._tokens

    def result(self) -> InputStatistics:
        """Return what was collected."""
        return InputStatistics(self._tokens, self._amax, self._gram, torch.cat(self._samples))


def draw(rows: int, quota: int, seed: int, batch: int) -> Tensor:
    """Return which rows of a batch go into the sample, in ascending order."""
    generator = torch.Generator().manual_seed(seed + batch)
    return torch.randperm(rows, generator=generator)[:quota].sort().values
