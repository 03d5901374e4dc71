"""The operators of compiled models, ``torch.ops.fpc``; importing this module registers them.

Each has a fake implementation, so that torch.compile and torch.export see through it. None writes
to its arguments, and none returns a view of them. Operands travel as text (see
:mod:`fpcompiler.operand`), because an operator's arguments are tensors, numbers and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.numerics import (
    dequantize,
    pack,
    packed_bytes,
    quantize,
    quantize_with,
    quantize_within,
    unpack,
)
from fpcompiler.numerics.folding import divide_columns
from fpcompiler.numerics.hadamard import hadamard
from fpcompiler.operand import Granularity, Operand, ScaleLevel
from fpcompiler.runtime import fused, reference

QUANTIZE: Final = "(Tensor x, str operand, str layer) -> Tensor[]"
"""Values to ``[codes, *scales]``."""

FUSED_QUANTIZE: Final = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, str producer, "
    "float eps, str operand, str layer) -> Tensor[]"
)
"""A norm or an activation of values, quantized; see :mod:`fpcompiler.runtime.fused`."""

ENCODE: Final = "(Tensor x, Tensor[] scales, str operand, str layer) -> Tensor"
"""Values to codes, with scales that are given."""

QUANTIZE_WITHIN: Final = "(Tensor x, Tensor outer, str operand, str layer) -> Tensor[]"
"""Values to ``[codes, block scales]``, with a scale of the tensor that is given."""

DEQUANTIZE: Final = "(Tensor[] value, str operand, ScalarType dtype) -> Tensor"
"""``[codes, *scales]`` to values."""

LINEAR: Final = (
    "(Tensor[] x, Tensor[] w, Tensor? bias, str x_operand, str w_operand, int k, "
    "ScalarType dtype, str layer, str activation='', Tensor? residual=None) -> Tensor"
)
"""See :func:`fpcompiler.runtime.reference.linear`; ``x_operand`` is empty if not quantized."""


LINEAR_STEP: Final = "fpc.linear"
"""What a quantized layer is called in a plan."""


class LinearArguments(NamedTuple):
    """The arguments of :data:`LINEAR` as a call or a step of a plan has them."""

    x: Sequence[Any]
    w: Sequence[Any]
    bias: Any
    x_operand: str
    w_operand: str
    k: int
    dtype: Any
    layer: str
    activation: str = ""
    residual: Any = None


def without_residual(args: Sequence[Any]) -> tuple[list[Any], Any]:
    """Return the arguments of :data:`LINEAR` without what is added at the end, and that or None."""
    if len(args) < len(LinearArguments._fields):
        return [*args], None
    return [*args[:-1], None], args[-1]


FOLD: Final = (
    "(Tensor codes, Tensor[] scales, Tensor powers, str source, str target, int shift) -> Tensor[]"
)
"""``[codes, *scales]`` with each column divided by a power of two, exactly."""

HADAMARD: Final = "(Tensor x, int block) -> Tensor"
"""The orthonormal Hadamard transform of each block of the last axis."""

PACK: Final = "(Tensor codes, int bits) -> Tensor"
"""Codes, one per byte, to packed bytes along the last axis."""

UNPACK: Final = "(Tensor packed, int bits, int k) -> Tensor"
"""The inverse: ``k`` codes a row."""


def scale_shape(shape: Sequence[int], level: ScaleLevel) -> tuple[int, ...]:
    """Return the shape of a level's scales for values of a shape; sizes may be symbolic."""
    if level.granularity is Granularity.TENSOR:
        return (1,) * len(shape)
    blocks = (shape[-1] + level.block - 1) // level.block if level.block else 1
    return (*shape[:-1], blocks)


def _quantize(x: Tensor, operand: str, layer: str) -> list[Tensor]:
    codes, scales = quantize(x, Operand.parse(operand), layer=layer)
    return [codes, *scales]


def _fake_quantize(x: Tensor, operand: str, layer: str) -> list[Tensor]:
    results = [x.new_empty(x.shape, dtype=torch.uint8)]
    for level in Operand.parse(operand).levels:
        dtype = torch.float32 if level.is_real else torch.uint8
        results.append(x.new_empty(scale_shape(x.shape, level), dtype=dtype))
    return results


def _fused_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
    operand: str,
    layer: str,
) -> list[Tensor]:
    values = fused.produce(x, weight, bias, scale, shift, producer, eps, layer)
    return _quantize(values, operand, layer)


def _fake_fused_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
    operand: str,
    layer: str,
) -> list[Tensor]:
    values = fused.produce(x, weight, bias, scale, shift, producer, eps, layer)
    return _fake_quantize(values, operand, layer)


def _encode(x: Tensor, scales: Sequence[Tensor], operand: str, layer: str) -> Tensor:
    return quantize_with(x, tuple(scales), Operand.parse(operand), layer=layer)


def _fake_encode(x: Tensor, scales: Sequence[Tensor], operand: str, layer: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _quantize_within(x: Tensor, outer: Tensor, operand: str, layer: str) -> list[Tensor]:
    return list(quantize_within(x, outer, Operand.parse(operand), layer=layer))


def _fake_quantize_within(x: Tensor, outer: Tensor, operand: str, layer: str) -> list[Tensor]:
    block = Operand.parse(operand).levels[-1]
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return [codes, x.new_empty(scale_shape(x.shape, block), dtype=torch.uint8)]


def _dequantize(value: Sequence[Tensor], operand: str, dtype: torch.dtype) -> Tensor:
    codes, *scales = value
    return dequantize(codes, tuple(scales), Operand.parse(operand), dtype)


def _fake_dequantize(value: Sequence[Tensor], operand: str, dtype: torch.dtype) -> Tensor:
    return value[0].new_empty(value[0].shape, dtype=dtype)


def _linear(*args: Any) -> Tensor:
    x, w, bias, x_text, w_text, k, dtype, layer, activation, residual = LinearArguments(*args)
    x_operand, w_operand = Operand.parse(x_text) if x_text else None, Operand.parse(w_text)
    _check_linear(x, w, x_operand, w_operand, k, layer)
    if activation and activation not in fused.ACTIVATIONS:
        raise NumericsError(f"{describe_layer(layer)}: there is no activation {activation!r}.")
    y = reference.linear(x, w, bias, x_operand, w_operand, k, dtype, activation)
    return fused.add_residual(y, residual, layer)


def _fake_linear(*args: Any) -> Tensor:
    given = LinearArguments(*args)
    shape = (*given.x[0].shape[:-1], given.w[0].shape[0])
    result: Tensor = given.x[0].new_empty(shape, dtype=given.dtype)
    return result


def _check_linear(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    x_operand: Operand | None,
    weight: Operand,
    k: int,
    layer: str,
) -> None:
    levels = len(x_operand.levels) if x_operand else 0
    if x[0].shape[-1] != k or len(x) != 1 + levels:
        raise NumericsError(
            f"{describe_layer(layer)}: expected activations [..., {k}] with {levels} scales, "
            f"got {list(x[0].shape)} with {len(x) - 1}."
        )
    size = packed_bytes(k, weight.format.storage_bits)
    if w[0].ndim != 2 or w[0].shape[1] != size or len(w) != 1 + len(weight.levels):
        raise NumericsError(
            f"{describe_layer(layer)}: expected a packed weight [N, {size}] with "
            f"{len(weight.levels)} scales, got {list(w[0].shape)} with {len(w) - 1}."
        )


def _fold(
    codes: Tensor,
    scales: Sequence[Tensor],
    powers: Tensor,
    source: str,
    target: str,
    shift: int,
) -> list[Tensor]:
    operands = Operand.parse(source), Operand.parse(target)
    folded, moved = divide_columns(codes, tuple(scales), powers, operands, shift=shift)
    return [part.clone() for part in (folded, *moved)]


def _fake_fold(
    codes: Tensor,
    scales: Sequence[Tensor],
    powers: Tensor,
    source: str,
    target: str,
    shift: int,
) -> list[Tensor]:
    return [part.new_empty(part.shape) for part in (codes, *scales)]


def _hadamard(x: Tensor, block: int) -> Tensor:
    return hadamard(x, block)


def _fake_hadamard(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _pack(codes: Tensor, bits: int) -> Tensor:
    return pack(codes, bits).clone()  # 8-bit codes pack to themselves: never return an argument


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], packed_bytes(codes.shape[-1], bits)))


def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    return unpack(packed, bits, k).clone()


def _fake_unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], k))


for _name, _schema, _run, _fake in (
    ("fpc::quantize", QUANTIZE, _quantize, _fake_quantize),
    ("fpc::fused_quantize", FUSED_QUANTIZE, _fused_quantize, _fake_fused_quantize),
    ("fpc::encode", ENCODE, _encode, _fake_encode),
    ("fpc::quantize_within", QUANTIZE_WITHIN, _quantize_within, _fake_quantize_within),
    ("fpc::dequantize", DEQUANTIZE, _dequantize, _fake_dequantize),
    ("fpc::linear", LINEAR, _linear, _fake_linear),
    ("fpc::fold", FOLD, _fold, _fake_fold),
    ("fpc::hadamard", HADAMARD, _hadamard, _fake_hadamard),
    ("fpc::pack", PACK, _pack, _fake_pack),
    ("fpc::unpack", UNPACK, _unpack, _fake_unpack),
):
    torch.library.define(_name, _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_name, "default", _run)
    torch.library.register_fake(_name, _fake)


def _keep_block(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _hadamard_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """The transform is symmetric, so it is its own derivative's transpose."""
    return torch.ops.fpc.hadamard(gradient.contiguous(), ctx.block), None


# Calibration differentiates the model; nothing else here has a derivative.
torch.library.register_autograd("fpc::hadamard", _hadamard_gradient, setup_context=_keep_block)
