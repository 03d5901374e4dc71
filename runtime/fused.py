"""What fused operations compute beside their own: norms and activations, step by step.

``fpc::fused_quantize`` quantizes what a producer computes. ``fpc::linear`` may return one of the
heads of its result, in the same type: an activation (:func:`activate`), and add a tensor to it
(:func:`add_residual`).

A producer is a head, and mostly a tail: ``silu_mul`` is the head ``silu`` with the tail ``mul``.
It is what the model computed in single operations, so each formula says where a result is rounded.
Here ``f32( )`` is a value as fp32 and ``T( )`` one rounded to the type of ``x``; a product or sum
outside of both is rounded once to the wider type of its two sides, as torch does it. ``C`` is the
length of the last axis; sums run over it, in fp32 and in any order.

==================  ===============================================================================
head                ``h`` =
==================  ===============================================================================
``rms_norm``        ``n * weight``, with ``n = T(f32(x) * r)``: LLaMA; ``n`` without a weight
``rms_norm_wide``   ``T(f32(x) * r * f32(weight))``, two products in fp32: Gemma, ``nn.RMSNorm``
``layer_norm``      ``T((f32(x) - m) * s * f32(weight) + f32(bias))``; without those not given
``silu``            ``T(f32(x) / (1 + exp(-f32(x))))``
``gelu``            ``T(f32(x) * (1 + erf(f32(x) / sqrt(2))) / 2)``
``gelu_tanh``       ``T(f32(x) * (1 + tanh(sqrt(2 / pi) * (f32(x) + 0.044715 f32(x)**3))) / 2)``
``relu``            ``max(x, 0)``
==================  ===============================================================================

``r = 1 / sqrt(sum(f32(x)**2) / C + eps)``, ``m = sum(f32(x)) / C``, and
``s = 1 / sqrt(sum((f32(x) - m)**2) / C + eps)``, all fp32, as is ``eps``.

==============  ===================================================================================
tail            what is quantized
==============  ===================================================================================
none            ``h``
``mul``         ``h * scale``: the other branch of a gated unit, or a factor for each channel
``add``         ``h + shift``
``modulate``    ``h * (1 + scale) + shift``, three rounded operations; without a shift, two
==============  ===================================================================================

``weight`` and ``bias`` are ``[C]``; ``scale`` and ``shift`` have ``C`` channels and are broadcast
to ``x``: ``[C]``, ``[B, 1, C]`` (adaLN, arXiv 2212.09748) or the shape of ``x``. They may be views
with any strides. The result is the one of the single operations, bit for bit on one device, because
the code below makes the same calls of torch; only for ``torch.rms_norm`` it spells out what torch
does on the CPU, where CUDA has a kernel of its own. A kernel that adds in another order or more
exactly, or has another ``exp``, may differ in last bits of ``h``, and where these decide in a code;
the one of the native library is ``fpcompiler/native/csrc/produce_rows.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from fpcompiler.errors import NumericsError, describe_layer

SLOTS: Final = ("weight", "bias", "scale", "shift")
"""The tensors beside ``x`` that a producer may read, in the order of the operator's arguments."""


@dataclass(frozen=True)
class Producer:
    """What computes the values that are quantized.

    Attributes:
        head: A name in :data:`HEADS`.
        tail: A name in :data:`TAILS`; empty for none.
    """

    head: str
    tail: str = ""

    @property
    def name(self) -> str:
        """The text by which operators and plans call it."""
        return f"{self.head}_{self.tail}" if self.tail else self.head

    def problem(self, given: frozenset[str]) -> str:
        """Return in words why some of :data:`SLOTS` are not what it reads; nothing if they are."""
        needed, optional = TAILS[self.tail]
        for slot in SLOTS:
            if slot in needed and slot not in given:
                return f"{self.name} needs a {slot}"
            if slot in given and slot not in {*needed, *optional, *HEADS[self.head]}:
                return f"{self.name} has no {slot}"
        return ""


HEADS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "rms_norm": ("weight",),
        "rms_norm_wide": ("weight",),
        "layer_norm": ("weight", "bias"),
        "silu": (),
        "gelu": (),
        "gelu_tanh": (),
        "relu": (),
    }
)
"""The slots that each head may read; it can do without them."""

ACTIVATIONS: Final = tuple(name for name, slots in HEADS.items() if not slots)
"""The heads that make each value of one alone."""

TAILS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = MappingProxyType(
    {
        "": ((), ()),
        "mul": (("scale",), ()),
        "add": (("shift",), ()),
        "modulate": (("scale",), ("shift",)),
    }
)
"""The slots that each tail reads, and those that it may read."""

PRODUCERS: Final[Mapping[str, Producer]] = MappingProxyType(
    {item.name: item for item in (Producer(head, tail) for head in HEADS for tail in TAILS)}
)
"""Every producer by name."""


def produce(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
    layer: str = "",
) -> Tensor:
    """Return the values that a fused quantizer rounds.

    Args:
        x: ``[..., C]``, fp32, fp16 or bf16.
        weight: Of a norm, ``[C]``, or None.
        bias: Of a layer norm, ``[C]``, or None.
        scale: What the tail multiplies with, or None.
        shift: What the tail adds, or None.
        producer: A name in :data:`PRODUCERS`.
        eps: Added to the mean square or the variance; without meaning for activations.
        layer: For errors.

    Returns:
        ``[..., C]``, of the type that torch gives the last operation.

    Raises:
        NumericsError: If there is no such producer, or it reads other tensors.
    """
    found = PRODUCERS.get(producer)
    if found is None:
        raise NumericsError(f"{describe_layer(layer)}: there is no producer {producer!r}.")
    slots = zip(SLOTS, (weight, bias, scale, shift), strict=True)
    problem = found.problem(frozenset(name for name, value in slots if value is not None))
    if problem:
        raise NumericsError(f"{describe_layer(layer)}: {problem}.")
    h = _FUNCTIONS[found.head](x, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale if found.tail == "modulate" else scale)
    return h if shift is None else h + shift


def activate(x: Tensor, activation: str) -> Tensor:
    """Return an activation of values, in their type: that of a linear layer's results.

    Args:
        x: The values.
        activation: One of :data:`ACTIVATIONS`, or empty, which gives ``x`` itself.
    """
    return _FUNCTIONS[activation](x, None, None, 0.0) if activation else x


def add_residual(y: Tensor, residual: Tensor | None, layer: str = "") -> Tensor:
    """Add to what a linear layer gives, in its place: two values of its type, rounded once.

    Args:
        y: What the layer gives; it is written over.
        residual: Of the same shape and type, or None, which leaves ``y`` as it is.
        layer: For errors.

    Raises:
        NumericsError: If the residual has another shape or type.
    """
    if residual is None:
        return y
    check_residual(residual, y.shape, y.dtype, layer)
    return y.add_(residual)


def check_residual(residual: Tensor, shape: Sequence[int], dtype: torch.dtype, layer: str) -> None:
    """Check that a residual is what a layer's output can be added to as it is.

    Raises:
        NumericsError: If it has another shape or type.
    """
    if tuple(residual.shape) != tuple(shape) or residual.dtype != dtype:
        raise NumericsError(
            f"{describe_layer(layer)}: a residual of {residual.dtype} {list(residual.shape)} "
            f"cannot be added to its output, {dtype} {list(shape)}."
        )


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Return the rows of fp32 values divided by their root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    h = _normalized(x.to(torch.float32), eps).to(x.dtype)
    return h if weight is None else weight * h


def _rms_norm_wide(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    h = _normalized(x.to(torch.float32), eps)
    return (h if weight is None else h * weight).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


_FUNCTIONS: Final[Mapping[str, Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]]] = (
    MappingProxyType(
        {
            "rms_norm": _rms_norm,
            "rms_norm_wide": _rms_norm_wide,
            "layer_norm": _layer_norm,
            "silu": lambda x, weight, bias, eps: functional.silu(x),
            "gelu": lambda x, weight, bias, eps: functional.gelu(x),
            "gelu_tanh": lambda x, weight, bias, eps: functional.gelu(x, approximate="tanh"),
            "relu": lambda x, weight, bias, eps: functional.relu(x),
        }
    )
)
