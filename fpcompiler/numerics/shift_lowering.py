"""Two ways to multiply with pre-shifted biases on tensor cores, both exact.

A format that is wide enough holds every folded weight ``w_j * 2**-k_j`` (:func:`container`): FP4
weights then need the rate and the bytes of FP6 or FP8. Or channels of equal ``k_j`` are made
neighbours, and ``2**-k_j`` becomes the E8M0 scale of their block (:func:`bucket_permutation`): both
operands stay as they are, and a few blocks end with zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.rounding import decode, encode

_SCALE_FORMAT: Final = FORMATS["f8E8M0FNU"]


@dataclass(frozen=True)
class Container:
    """A format that holds ``value * 2**-k`` for every value of another format.

    Attributes:
        source: The format that is held.
        format: The format that holds it.
        shift: A number is held as ``2**shift`` times its size.
        limit: The largest ``k``.
    """

    source: FloatSpec
    format: FloatSpec
    shift: int
    limit: int

    @property
    def factor(self) -> float:
        """What a decoded value is to be multiplied by, for instance in the scale of a row."""
        return 2.0**-self.shift

    def fold(self, codes: Tensor, exponents: Tensor) -> Tensor:
        """Return the codes of ``value * 2**(shift - k_j)``, exactly.

        Args:
            codes: Codes of :attr:`source`, uint8 ``[..., K]``.
            exponents: ``k_j``, integers ``[K]``, 0 to :attr:`limit`.

        Returns:
            Codes of :attr:`format`, uint8 ``[..., K]``.

        Raises:
            NumericsError: If there are not K exponents, or one is out of range.
        """
        if exponents.shape != codes.shape[-1:]:
            raise NumericsError(
                f"codes {list(codes.shape)} need as many exponents as columns, "
                f"not {list(exponents.shape)}."
            )
        if bool(((exponents < 0) | (exponents > self.limit)).any()):
            raise NumericsError(
                f"{self.format} holds {self.source} with exponents 0 to {self.limit}, but some are "
                "out of that range; choose the container for the largest of them."
            )
        power = exact_power(self.shift - exponents)
        return encode(decode(codes, self.source) * power, self.format)


def container_shifts(source: FloatSpec, target: FloatSpec, limit: int = 0) -> tuple[int, ...]:
    """Return every ``s`` with ``value * 2**(s - k)`` in ``target`` for ``k`` from 0 to ``limit``.

    Infinity and NaN of either format do not count.
    """
    wanted = _folded_magnitudes(source, limit)
    held = frozenset(v for v in target.values if math.isfinite(v) and v >= 0)
    # The smallest folded value must not be below the smallest number, nor the largest above.
    first = _least_exponent(target) - (_least_exponent(source) - limit)
    last = target.max_exponent - source.max_exponent
    return tuple(
        shift
        for shift in range(first, last + 1)
        if all(math.ldexp(value, shift) in held for value in wanted)
    )


def container(source: FloatSpec, limit: int, candidates: Sequence[FloatSpec]) -> Container:
    """Return the first candidate that holds ``value * 2**-k`` for ``k`` from 0 to ``limit``.

    Of the powers of two that fit, it takes the one nearest to 1.

    Args:
        source: The format of the weights.
        limit: The largest exponent ``k_j``.
        candidates: The formats to choose from, the best first.

    Raises:
        NumericsError: If none of the candidates holds all values.
    """
    for target in candidates:
        shifts = container_shifts(source, target, limit)
        if shifts:
            return Container(source, target, min(shifts, key=lambda s: (abs(s), s)), limit)
    names = ", ".join(map(str, candidates))
    raise NumericsError(
        f"none of {names} holds {source} times 2**-k for k up to {limit}. Lower the limit of the "
        "exponents, allow a wider format, or permute the channels into blocks of equal exponents."
    )


def container_limit(source: FloatSpec, most: int, candidates: Sequence[FloatSpec]) -> int:
    """Return the largest exponent, up to ``most``, for which there is a :func:`container`."""
    held = (
        k for k in range(most, 0, -1) if any(container_shifts(source, t, k) for t in candidates)
    )
    return next(held, 0)


@dataclass(frozen=True, eq=False)
class Buckets:
    """An order of channels in which each group has one exponent.

    Attributes:
        order: The channel at each place, int64 ``[P]``, where P is a multiple of ``group`` and the
            channel K stands for zeros.
        group: Channels in a group.
        group_exponents: The exponent of each group, int32 ``[P / group]``, rising.
        exponents: The exponent of each channel, int32 ``[K]``: as given, or less where buckets
            have been merged.
    """

    order: Tensor
    group: int
    group_exponents: Tensor
    exponents: Tensor

    @property
    def scale_codes(self) -> Tensor:
        """The E8M0 codes of ``2**-k`` for each group, uint8 ``[P / group]``."""
        return encode(exact_power(-self.group_exponents), _SCALE_FORMAT)

    def permute(self, x: Tensor) -> Tensor:
        """Return values or codes ``[..., K]`` in the order, with zeros in between: ``[..., P]``."""
        padded = torch.nn.functional.pad(x, (0, 1))
        return padded.index_select(-1, self.order)


def bucket_permutation(
    exponents: Tensor, *, group: int = 32, max_buckets: int | None = None
) -> Buckets:
    """Return an order in which channels of equal exponents fill whole groups.

    A bucket is filled up with at most ``group - 1`` zeros. Channels of a bucket keep their order.
    With more different exponents than buckets, channels move to the next smaller exponent that is
    left, which clips nothing and rounds more coarsely; those are left for which the sum of
    ``4**-k_j``, the squared steps of the channels, is least.

    Args:
        exponents: ``k_j``, integers ``[K]`` from 0 to 31.
        group: Channels that share a scale.
        max_buckets: How many different exponents there may be; by default any number.

    Raises:
        NumericsError: If the exponents are not such integers, or a size is not positive.
    """
    _require_exponents(exponents, group, max_buckets)
    counts = torch.bincount(exponents.long()).tolist()
    kept = _kept_exponents(counts, len(counts) if max_buckets is None else max_buckets)
    merged = _round_down(exponents, kept)
    channels = torch.argsort(merged, stable=True)
    sizes = [sum(counts[low:high]) for low, high in itertools.pairwise([*kept, len(counts)])]
    groups = [-(-size // group) for size in sizes]
    device = exponents.device
    order = torch.full((sum(groups) * group,), len(exponents), device=device)
    place = first = 0
    for size, length in zip(sizes, groups, strict=True):
        order[place : place + size] = channels[first : first + size]
        place, first = place + length * group, first + size
    repeated = [k for k, length in zip(kept, groups, strict=True) for _ in range(length)]
    return Buckets(order, group, torch.tensor(repeated, dtype=torch.int32, device=device), merged)


def _least_exponent(spec: FloatSpec) -> int:
    """Return the exponent of the smallest positive number, which is a power of two."""
    return spec.min_exponent - spec.mantissa_bits


def _folded_magnitudes(spec: FloatSpec, limit: int) -> frozenset[float]:
    """Return the different magnitudes of ``value * 2**-k``, zero included."""
    sizes = [v for v in spec.values if math.isfinite(v) and v >= 0]
    return frozenset(math.ldexp(v, -k) for v in sizes for k in range(limit + 1))


def _kept_exponents(counts: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` exponents, rising, with the least sum of squared steps.

    ``best[k]`` is the least cost of all channels with an exponent of ``k`` or more, if ``k`` is
    kept and a number of buckets is left, with what is kept; one more bucket in each round.
    """
    used = [k for k, count in enumerate(counts) if count]
    best = {k: (sum(counts[k:]) * 4.0**-k, [k]) for k in used}
    for _ in range(most - 1):
        best = {k: min(_splits(k, counts, best)) for k in used}
    return best[used[0]][1] if used else []


def _splits(
    k: int, counts: Sequence[int], best: Mapping[int, tuple[float, list[int]]]
) -> Iterator[tuple[float, list[int]]]:
    """Yield the costs of a bucket ``k``: alone, and before each of the later ones."""
    yield best[k]
    for after, (cost, kept) in best.items():
        if after > k:
            yield sum(counts[k:after]) * 4.0**-k + cost, [k, *kept]


def _round_down(exponents: Tensor, kept: Sequence[int]) -> Tensor:
    """Return the largest kept exponent that is not above each."""
    if not kept:
        return exponents.to(torch.int32)
    levels = torch.tensor(kept, dtype=torch.int32, device=exponents.device)
    return levels[torch.bucketize(exponents.to(torch.int32), levels, right=True) - 1]


def _require_exponents(exponents: Tensor, group: int, max_buckets: int | None) -> None:
    whole = not exponents.is_floating_point() and exponents.dtype != torch.bool
    if exponents.ndim != 1 or not whole or bool(((exponents < 0) | (exponents > 31)).any()):
        raise NumericsError(
            f"exponents must be integers [K] from 0 to 31, not {exponents.dtype} "
            f"{list(exponents.shape)}."
        )
    if group < 1 or (max_buckets is not None and max_buckets < 1):
        raise NumericsError(
            f"a group of {group} channels and {max_buckets} buckets are not possible; both must be "
            "at least 1."
        )
