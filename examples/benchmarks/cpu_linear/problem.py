"""What every peer is given, and what it makes of it: something that can be timed and checked."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_COPIES = 64
"""Copies of a weight, at most: about the layers of a model. Those of small shapes fit a cache."""


class NotInstalledError(Exception):
    """A peer that cannot run here because something is not installed; the message names it."""


class UnsuitableError(Exception):
    """A peer that cannot run a shape, or gives a wrong result; the message says why."""


@dataclass(frozen=True)
class Problem:
    """A linear layer without bias, and its input.

    Attributes:
        weight: fp32 ``[N, K]``.
        x: fp32 ``[M, K]``.
        threads: How many threads a product may use.
        cold_bytes: How many bytes of weights are gone through before one is used again; 0: always
            the same one.
    """

    weight: Tensor
    x: Tensor
    threads: int
    cold_bytes: int

    def copies(self, size: int) -> int:
        """Return how many copies of a weight of ``size`` bytes are gone through."""
        return max(1, min(MOST_COPIES, math.ceil(self.cold_bytes / size)))

    def rolled(self, values: Any, copy: int) -> Any:
        """Return rows of an array in another order: some runtimes store equal weights once."""
        return torch.as_tensor(values).roll(copy, 0).numpy()


@dataclass(frozen=True)
class Work:
    """Products of the input and copies of the weight.

    Attributes:
        run: Multiplies with copy ``i``; if ``products`` is more than 1, with all copies.
        result: Gives the result for copy 0 after it was run, fp32 ``[M, N]``; None: there is none.
        weight_bytes: Bytes of the weight that one product reads.
        copies: Number of copies; ``run`` is called with ``0 <= i < copies``.
        products: How many products one call of ``run`` makes.
    """

    run: Callable[[int], object]
    result: Callable[[], Tensor] | None
    weight_bytes: int
    copies: int
    products: int = 1


Builder = Callable[[Problem], Work]
"""What makes the work of a peer.

Raises:
    NotInstalledError: If the peer cannot run on this machine.
    UnsuitableError: If it cannot run this shape.
"""


@dataclass(frozen=True)
class Peer:
    """A row of the benchmark.

    Attributes:
        name: What the command line and the results call it.
        title: What the table says.
        limit: The relative error (of the Frobenius norm) beyond which its result is wrong.
        build: Makes its work.
        package: What must be installed, for the results to name its version.
        note: What must be known to read its times.
    """

    name: str
    title: str
    limit: float
    build: Builder
    package: str = "torch"
    note: str = ""


def imported(name: str) -> Any:
    """Return a module of a peer.

    Raises:
        NotInstalledError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotInstalledError(f"{name} is not installed") from None


def require_multiple(name: str, value: int, factor: int) -> None:
    """Check a dimension.

    Raises:
        UnsuitableError: If it is not a multiple of ``factor``.
    """
    if value % factor:
        raise UnsuitableError(f"{name}={value} is not a multiple of {factor}")


def relative_error(work: Work, problem: Problem) -> float | None:
    """Return the error of a result relative to the fp32 product, or None if there is no result."""
    if work.result is None:
        return None
    work.run(0)
    wanted = problem.x @ problem.weight.T
    return float((work.result() - wanted).norm() / wanted.norm())


def signed_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return int8 values in -7..7, ``[N, K / block, block]``, and their fp32 scales ``[.., 1]``."""
    blocks = weight.view(len(weight), -1, block)
    scale = blocks.abs().amax(2, keepdim=True) / 7
    return (blocks / scale).round().to(torch.int8), scale


def nibbles(codes: Tensor) -> Tensor:
    """Return codes of four bits two a byte, the first one low: uint8 ``[..., K / 2]``."""
    low, high = codes.view(torch.uint8).view(*codes.shape[:-1], -1, 2).unbind(-1)
    return low.bitwise_and(15).bitwise_or(high << 4)
