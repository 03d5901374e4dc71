"""Times of the kernels of packed weights on Hopper, and of cuBLAS in bf16 beside them.

A layer takes the time of its product and of quantizing its activations, in microseconds::

    few tokens    a + b * bytes of W + c * M K + d * M N K
    many tokens   max(time of the tiles, 2 M N K / rate) + q + r * M K
    bf16          f + (t**p + u**p)**(1/p),  t = bytes / bandwidth,  u = 2 M N K / rate

The time of the tiles is that by which the launch itself chooses them (``choose_many.h``): waves of
tiles, each a fixed time and one for each unit of K. All numbers are in ``sm_90a.json``, which
``examples/benchmarks/hopper_costs.py`` fits to recorded times; nothing here was fitted by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from fpcompiler.operand import Granularity, Operand
from fpcompiler.runtime.costs.call import LayerCall, Prediction
from fpcompiler.runtime.cuda.fragments import Mode, mode_of

GPU: Final = "sm_90a"
FILE: Final = f"{GPU}.json"

_RECORDED: Final = ("device", "date", "source", "sizes", "errors")
_UNIT_K: Final = 128
_ROWS: Final = 64  # of a warpgroup
_SHARED_BYTES: Final = {"int8": 1, "fp8": 2, "bf16": 2}
"""Of a number of X in the shared memory of the kernel for few tokens."""
_NAMES: Final = {Mode.INTEGERS: "int8", Mode.E4M3: "fp8", Mode.BF16: "bf16"}
PLAIN: Final = "bf16, not quantized"
QUANTIZED: Final = "bf16, quantized"
SCALED: Final = "bf16, scale of the tensor"


@dataclass(frozen=True)
class Tile:
    """A shape of tile of the kernel for many tokens.

    Attributes:
        tokens: Of a tile.
        split: Blocks that share K.
        groups: Warpgroups, of 64 rows each.
        fixed: Nanoseconds of a tile.
        each: Nanoseconds of a unit of K.
        per_sm: Tiles that an SM computes at once.
    """

    tokens: int
    split: int
    groups: int
    fixed: int
    each: int
    per_sm: int

    def microseconds(self, m: int, n: int, k: int, sms: int) -> float:
        """Return the time of a product; infinite if blocks would share nothing."""
        units = -(-k // _UNIT_K)
        if units < self.split:
            return float("inf")
        tiles = -(-n // (_ROWS * self.groups)) * -(-m // self.tokens)
        waves = -(-tiles // (sms * self.per_sm // self.split))
        return waves * (self.fixed + self.each * -(-units // self.split)) / 1000


@dataclass(frozen=True)
class Plain:
    """cuBLAS in bf16: microseconds, bytes and operations per microsecond, and an exponent."""

    fixed: float
    bandwidth: float
    rate: float
    sharpness: float

    def microseconds(self, m: int, n: int, k: int) -> float:
        """Return the time of a product."""
        read = 2 * (n * k + m * k + m * n) / self.bandwidth
        computed = 2 * m * n * k / self.rate
        # Both at once take longer than the longer one where they are about the same.
        longer, shorter = max(read, computed), min(read, computed)
        both = longer * (1 + (shorter / longer) ** self.sharpness) ** (1 / self.sharpness)
        return float(self.fixed + both)


@dataclass(frozen=True)
class Kind:
    """Layers that are computed alike.

    Attributes:
        few: Factors of :func:`few_terms`.
        rate: Operations per microsecond that many tiles reach for long.
        quantize: Factors of :func:`quantize_terms`.
    """

    few: tuple[float, ...]
    rate: float
    quantize: tuple[float, ...]


@dataclass(frozen=True)
class HopperCosts:
    """All numbers of the model.

    Attributes:
        record: Where they come from: ``device``, ``date``, ``source``, the least and the most of
            ``sizes``, and ``errors`` of the fit.
        sms: Multiprocessors.
        few_tokens: The most that the kernel for few tokens takes.
        few_bytes: The most that activations may take in its shared memory.
        plain: cuBLAS.
        tiles: The tiles by what is multiplied.
        kinds: See :func:`kind_of`.
    """

    record: Mapping[str, Any]
    sms: int
    few_tokens: int
    few_bytes: int
    plain: Plain
    tiles: Mapping[str, tuple[Tile, ...]]
    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> HopperCosts:
        """Return what JSON values say."""
        return cls(
            record={name: data[name] for name in _RECORDED},
            sms=data["sms"],
            few_tokens=data["few_tokens"],
            few_bytes=data["few_bytes"],
            plain=Plain(**data["bf16"]),
            tiles={name: tuple(Tile(*row) for row in rows) for name, rows in data["tiles"].items()},
            kinds={
                name: Kind(tuple(row["few"]), row["rate"], tuple(row["quantize"]))
                for name, row in data["kinds"].items()
            },
        )

    def predict(self, call: LayerCall) -> Prediction | str:
        """Return the times of a layer that is alone, or why there is no prediction."""
        name = kind_of(call.weight, call.activation)
        if name is None:
            return f"no times of w={call.weight},a={call.activation or 'none'} were recorded"
        plain = self.plain.microseconds(call.m, call.n, call.k)
        return Prediction(self.microseconds(call, name), plain)

    def microseconds(self, call: LayerCall, name: str) -> float:
        """Return the time of a product of a kind, with the quantizing of its activations."""
        kind = self.kinds[name]
        factors = kind.few if self.has_few(call, name) else kind.quantize
        terms = zip(factors, self.terms(call, name), strict=True)
        return self.base(call, name) + sum(factor * term for factor, term in terms)

    def has_few(self, call: LayerCall, name: str) -> bool:
        """Return whether the kernel for few tokens computes a layer of a kind."""
        units = -(-call.k // _UNIT_K)
        row = units * _UNIT_K * _SHARED_BYTES[_arithmetic(name)]
        # Two blocks share K where it can be halved.
        needed = (call.m + 1) * row / (1 if units % 2 else 2)
        return call.m <= self.few_tokens and needed <= self.few_bytes

    def base(self, call: LayerCall, name: str) -> float:
        """Return the part of the time that no factor is fitted to."""
        if self.has_few(call, name):
            return 0.0
        tiles = self.tiles[tiles_of(call.weight, name)]
        times = (tile.microseconds(call.m, call.n, call.k, self.sms) for tile in tiles)
        return max(min(times), call.operations / self.kinds[name].rate)

    def terms(self, call: LayerCall, name: str) -> tuple[float, ...]:
        """Return what the factors of a kind are multiplied by."""
        return few_terms(call) if self.has_few(call, name) else quantize_terms(call)


def few_terms(call: LayerCall) -> tuple[float, ...]:
    """Return 1, megabytes of W, and millions of numbers of X and of products."""
    inputs = call.m * call.k / 1e6
    return 1.0, call.weight_bytes / 1e6, inputs, inputs * call.n


def quantize_terms(call: LayerCall) -> tuple[float, ...]:
    """Return 1, and millions of numbers of X."""
    return 1.0, call.m * call.k / 1e6


def kind_of(weight: Operand, activation: Operand | None) -> str | None:
    """Return the name of the kind of a layer, or None if there is no kernel of packed weights.

    Layers of a kind have the same kernels, or ones that differ in tables only.
    """
    mode = mode_of(weight, activation)
    if mode is None:
        return None
    if mode is not Mode.BF16:
        return _NAMES[mode]
    outer = activation.outer if activation else None
    if outer is not None and outer.granularity is Granularity.TENSOR:
        return SCALED
    return QUANTIZED if activation else PLAIN


def tiles_of(weight: Operand, name: str) -> str:
    """Return the name of the list of tiles for weights, given the name of a kind."""
    arithmetic = _arithmetic(name)
    return f"{arithmetic}, blocks" if arithmetic == "bf16" and weight.block else arithmetic


def _arithmetic(name: str) -> str:
    return name.partition(",")[0]


@cache
def hopper_costs() -> HopperCosts:
    """Return the model that this version has."""
    text = (resources.files("fpcompiler.runtime.costs") / FILE).read_text("utf-8")
    return HopperCosts.of(json.loads(text))
