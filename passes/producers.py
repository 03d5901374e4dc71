"""What computes a value, if it is a norm or an activation: the patterns of the fusing passes.

They find the operations as torch.export leaves them, in the very order and types of the formulas
in :mod:`fpcompiler.runtime.fused`; anything else is no match, however close it may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch_mlir import ir

from fpcompiler.ir.dialect import FLOATS
from fpcompiler.ir.fused_quantize import broadcasts
from fpcompiler.ir.torch_ops import constant_value, operator_name
from fpcompiler.ir.types import tensor_type
from fpcompiler.runtime.fused import ACTIVATIONS, Producer

_ATEN: Final = "torch.aten."
_ACTIVATIONS: Final = ("silu", "relu")
_GELU: Final = {"none": "gelu", "tanh": "gelu_tanh"}
_RMS_NORM_EPS: Final = torch.finfo(torch.float32).eps
"""What ``torch.rms_norm`` takes for values of 16 and 32 bits where none is given."""


@dataclass(frozen=True)
class Found:
    """A producer with what it reads.

    Attributes:
        producer: Head and tail.
        input: What the head is computed from.
        weight, bias, scale, shift: As in :mod:`fpcompiler.runtime.fused`; None where not read.
        eps: Of a norm.
        inner: Values between the input and the result, of the size of the result.
    """

    producer: Producer
    input: ir.Value
    weight: ir.Value | None = None
    bias: ir.Value | None = None
    scale: ir.Value | None = None
    shift: ir.Value | None = None
    eps: float = 0.0
    inner: tuple[ir.Value, ...] = ()

    @property
    def slots(self) -> tuple[ir.Value | None, ...]:
        """What is read beside the input, in the order of the operation's operands."""
        return self.weight, self.bias, self.scale, self.shift


def find_producer(value: ir.Value) -> Found | None:
    """Return what computes a value, or None if it is nothing of what can be fused."""
    found = _head(value) or _modulated(value) or _product(value) or _sum(value)
    return found if found is not None and _fits(found) else None


def find_activation(value: ir.Value) -> Found | None:
    """Return what computes a value if it is an activation of another one, and nothing else."""
    found = _head(value)
    if found is None or found.producer.name not in ACTIVATIONS:
        return None
    return found if _fits(found) else None


def _fits(found: Found) -> bool:
    """Whether types and shapes are those that a fused operation takes."""
    source = tensor_type(found.input)
    if source is None or not source.shape or source.element not in FLOATS:
        return False
    beside = [tensor_type(value) for value in found.slots if value is not None]
    return all(
        kind is not None and kind.element in FLOATS and broadcasts(kind, source) for kind in beside
    )


# Tails: each is a head with one or two operations after it.


def _modulated(value: ir.Value) -> Found | None:
    """Find ``h * (1 + scale)``, mostly with ``+ shift``; both in either order."""
    for product, shift in [(value, None), *terms(value)]:
        for normalized, factor in _factors(product):
            scale, found = _above_one(factor), _head(normalized)
            if scale is None or found is None:
                continue
            inner = (*found.inner, normalized, *(() if shift is None else (product,)))
            tail = Producer(found.producer.head, "modulate")
            return replace(found, producer=tail, scale=scale, shift=shift, inner=inner)
    return None


def _product(value: ir.Value) -> Found | None:
    """Find ``h * scale``, in either order."""
    for factor, scale in _factors(value):
        found = _head(factor)
        if found is not None:
            tail = Producer(found.producer.head, "mul")
            return replace(found, producer=tail, scale=scale, inner=(*found.inner, factor))
    return None


def _sum(value: ir.Value) -> Found | None:
    """Find ``h + shift``, in either order."""
    for term, shift in terms(value):
        found = _head(term)
        if found is not None:
            tail = Producer(found.producer.head, "add")
            return replace(found, producer=tail, shift=shift, inner=(*found.inner, term))
    return None


def _above_one(value: ir.Value) -> ir.Value | None:
    """Return ``scale``, if a value is ``1 + scale``."""
    args = _call(value, "add.Scalar")
    return args[0] if args and _number(args[1]) == 1 and _number(args[2]) == 1 else None


# Heads.


def _head(value: ir.Value) -> Found | None:
    name = _name(value)
    if name in _ACTIVATIONS:
        return Found(Producer(name), value.owner.operands[0])
    if name == "gelu":
        x, approximate = value.owner.operands
        kind = _GELU.get(str(_number(approximate)))
        return None if kind is None else Found(Producer(kind), x)
    if name in ("layer_norm", "native_layer_norm"):
        return _layer_norm(value)
    return _rms_norm_operator(value) if name == "rms_norm" else _rms_norm(value)


def _layer_norm(value: ir.Value) -> Found | None:
    x, shape, weight, bias, eps = list(value.owner.operands)[:5]
    number = _number(eps)
    if value != value.owner.results[0] or _length(shape) != 1 or number is None:
        return None
    return Found(Producer("layer_norm"), x, _tensor(weight), _tensor(bias), eps=float(number))


def _rms_norm_operator(value: ir.Value) -> Found | None:
    """Read ``torch.rms_norm``, which computes in fp32 and rounds once."""
    x, shape, weight, eps = value.owner.operands
    absent = _name(eps) == "torch.constant.none"
    number = _RMS_NORM_EPS if absent else _number(eps)
    if _length(shape) != 1 or number is None:
        return None
    return Found(Producer("rms_norm_wide"), x, _tensor(weight), eps=float(number))


def _rms_norm(value: ir.Value) -> Found | None:
    """Find an RMSNorm in single operations: the weight after the cast, before it, or none."""
    for normalized, weight in _factors(value):
        found = _rounded_norm(normalized) if _is_weight(weight, normalized) else None
        if found is not None:
            return replace(found, weight=weight, inner=(*found.inner, normalized))
    return _rounded_norm(value) or _wide_norm(value)


def _rounded_norm(value: ir.Value) -> Found | None:
    """Find ``T(f32(x) * r)``."""
    wide = _uncast(value)
    found = _normalized(wide, _element(value))
    return found if found is None or wide == value else replace(found, inner=(wide,))


def _wide_norm(value: ir.Value) -> Found | None:
    """Find ``T(f32(x) * r * f32(weight))``."""
    wide = _uncast(value)
    for normalized, weight in _factors(wide):
        found = _normalized(normalized, _element(value))
        if found is not None and _is_weight(weight, normalized):
            producer = Producer("rms_norm_wide")
            return replace(found, producer=producer, weight=weight, inner=(normalized, wide))
    return None


def _normalized(value: ir.Value, element: str) -> Found | None:
    """Find ``f32(x) * r`` with ``r = rsqrt(mean(f32(x)**2) + eps)``, ``x`` of an element type."""
    for side, factor in _factors(value):
        root = _call(factor, "rsqrt")
        total = _call(root[0], "add.Scalar") if root else []
        squared = _mean_square_of(total[0]) if total and _number(total[2]) == 1 else None
        if squared is None or _element(squared) != "f32" or _element(value) != "f32":
            continue
        x = squared if element == "f32" else _uncast(squared)
        eps = _number(total[1])
        if side in (x, squared) and _element(x) == element and eps is not None:
            return Found(Producer("rms_norm"), x, eps=float(eps))
    return None


def _mean_square_of(value: ir.Value) -> ir.Value | None:
    """Return what the mean of the squares over the last axis is taken of."""
    mean = _call(value, "mean.dim")
    if not mean or _number(mean[2]) is not True or _name(mean[3]) != "torch.constant.none":
        return None
    axes, kind = mean[1], tensor_type(mean[0])
    if kind is None or _length(axes) != 1:
        return None
    if _number(axes.owner.operands[0]) not in (-1, len(kind.shape) - 1):
        return None
    power = _call(mean[0], "pow.Tensor_Scalar")
    if power and _number(power[1]) == 2:
        return power[0]
    product = _call(mean[0], "mul.Tensor")
    return product[0] if product and product[0] == product[1] else None


def _is_weight(weight: ir.Value, normalized: ir.Value) -> bool:
    kind, source = tensor_type(weight), tensor_type(normalized)
    return kind is not None and source is not None and kind.shape == source.shape[-1:]


# Reading operations.


def _name(value: ir.Value) -> str:
    """Return the operation that computes a value, without torch's prefix; empty for arguments."""
    if isinstance(value.owner, ir.Block):
        return ""
    return operator_name(value.owner.operation).removeprefix(_ATEN)


def _call(value: ir.Value, name: str) -> list[ir.Value]:
    """Return the operands of what computes a value if it has a name; nothing if it has another."""
    return list(value.owner.operands) if _name(value) == name else []


def _factors(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the factors of a product in both orders."""
    args = _call(value, "mul.Tensor")
    if args:
        yield args[0], args[1]
        yield args[1], args[0]


def terms(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the terms of a sum (``aten.add.Tensor`` without a factor) in both orders."""
    args = _call(value, "add.Tensor")
    if args and _number(args[2]) == 1:
        yield args[0], args[1]
        yield args[1], args[0]


def _number(value: ir.Value) -> Any:
    """Return a scalar constant; None for anything else."""
    if not _name(value).startswith("torch.constant."):
        return None
    return constant_value(value.owner.operation)


def _length(value: ir.Value) -> int:
    """Return the length of a list that is written out, 0 of anything else."""
    return len(value.owner.operands) if _name(value) == "torch.prim.ListConstruct" else 0


def _tensor(value: ir.Value) -> ir.Value | None:
    """Return an operand that may be missing."""
    return None if _name(value) == "torch.constant.none" else value


def _element(value: ir.Value) -> str:
    kind = tensor_type(value)
    return "" if kind is None else kind.element


def _uncast(value: ir.Value) -> ir.Value:
    """Return what a value is a cast of; itself if it is none."""
    name = _name(value)
    if name in ("to.dtype", "type_as"):
        return value.owner.operands[0]
    if name == "_to_copy" and _name(value.owner.operands[3]) == "torch.constant.none":
        return value.owner.operands[0]
    return value
