"""Does a plan fit its tensors? Codes of the right length, scales of the right shape and value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.errors import FormatError
from fpcompiler.formats import FloatSpec, Specials
from fpcompiler.numerics import packed_bytes
from fpcompiler.numerics.given import is_nested
from fpcompiler.operand import Granularity, Operand, ScaleLevel
from fpcompiler.plan import Plan, Step, used_values

_LINEAR: Final = (
    "x", "w", "bias", "x_operand", "w_operand", "k", "dtype", "layer", "activation", "residual",
)  # fmt: skip
_DEQUANTIZE: Final = ("value", "operand", "dtype")
_QUANTIZE: Final = ("x", "operand", "layer")
_WITHIN: Final = ("x", "outer", "operand", "layer")
_FUSED_QUANTIZE: Final = (
    "x", "weight", "bias", "scale", "shift", "producer", "eps", "operand", "layer",
)  # fmt: skip


def check(plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong between a plan and its tensors, one text per problem.

    Every tensor that the plan names must exist. Quantized constants must have codes of the length
    that their format and K ask for, and scales that are finite, positive, and of the dtype and
    shape of their level.
    """
    problems = [
        f"the plan names the tensor {key!r}, which is missing"
        for key in [*plan.constants.values(), *plan.state.values()]
        if key not in tensors
    ]
    if problems:
        return problems
    values = {name: tensors[key] for name, key in plan.constants.items()}
    for index, step in enumerate(plan.steps):
        where = f"layer {step.layer!r}" if step.layer else f"step {index} ({step.op})"
        problems += [f"{where}: {problem}" for problem in _check_step(step, values)]
    return problems


def _check_step(step: Step, values: Mapping[str, Tensor]) -> Iterator[str]:
    try:
        if step.op == "fpc.linear":
            yield from _check_linear(_arguments(step, _LINEAR), values)
        elif step.op == "fpc.dequantize":
            yield from _check_dequantize(_arguments(step, _DEQUANTIZE), values)
        elif step.op == "fpc.quantize":
            Operand.parse(_text(_arguments(step, _QUANTIZE), "operand"))
        elif step.op == "fpc.quantize_within":
            yield from _check_within(_arguments(step, _WITHIN), values)
        elif step.op == "fpc.fused_quantize":
            Operand.parse(_text(_arguments(step, _FUSED_QUANTIZE), "operand"))
    except FormatError as error:
        yield str(error)


def _arguments(step: Step, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, step.args, strict=False)), **step.kwargs}


def _check_linear(arguments: Mapping[str, Any], values: Mapping[str, Tensor]) -> Iterator[str]:
    operand = Operand.parse(_text(arguments, "w_operand"))
    if arguments.get("x_operand"):
        Operand.parse(_text(arguments, "x_operand"))
    k, weight = arguments.get("k"), _constants(arguments.get("w"), values)
    if type(k) is not int or k < 1:
        yield f"K is {k!r}"
        return
    if not weight:
        return  # The weight is computed by the program, so there is nothing stored to check.
    codes, *scales = weight
    size = packed_bytes(k, operand.format.storage_bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != size:
        yield (
            f"the weight's codes are {_kind(codes)}; K = {k} values of {operand.format} take "
            f"uint8 [N, {size}]"
        )
        return
    yield from _check_codes(codes, operand.format)
    yield from _check_scales((codes.shape[0], k), scales, operand)
    bias = _constants([arguments.get("bias")], values)
    if bias and (bias[0].shape != codes.shape[:1] or not bias[0].is_floating_point()):
        yield f"the bias is {_kind(bias[0])} for {codes.shape[0]} rows"


def _check_dequantize(arguments: Mapping[str, Any], values: Mapping[str, Tensor]) -> Iterator[str]:
    operand = Operand.parse(_text(arguments, "operand"))
    stored = _constants(arguments.get("value"), values)
    if not stored:
        return
    codes, *scales = stored
    if codes.dtype != torch.uint8 or codes.ndim < 1:
        yield f"the codes are {_kind(codes)}, not uint8"
        return
    yield from _check_codes(codes, operand.format)
    yield from _check_scales(codes.shape, scales, operand)


def _check_within(arguments: Mapping[str, Any], values: Mapping[str, Tensor]) -> Iterator[str]:
    operand = Operand.parse(_text(arguments, "operand"))
    if not is_nested(operand):
        yield f"{operand} has no scale of the tensor with scales of blocks in it"
    for scale in _constants([arguments.get("outer")], values):
        positive = scale.dtype == torch.float32 and bool((scale.isfinite() & (scale > 0)).all())
        if scale.numel() != 1 or not positive:
            yield f"the scale of the tensor is {_kind(scale)}, not one positive fp32 number"


def _text(arguments: Mapping[str, Any], name: str) -> str:
    text = arguments.get(name)
    if not isinstance(text, str):
        raise FormatError(f"{name} is {text!r}, not the text of an operand")
    return text


def _constants(argument: Any, values: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tensors that an argument names; none if one is not a constant."""
    names = [*used_values(argument)]
    return [values[name] for name in names] if values.keys() >= {*names} else []


def _check_codes(codes: Tensor, spec: FloatSpec) -> Iterator[str]:
    if spec.specials is Specials.NONE or not codes.numel():
        return
    if bool(((codes & ((1 << spec.magnitude_bits) - 1)) > spec.max_code).any()):
        yield f"some codes of {spec} are NaN or infinite"


def _check_scales(
    shape: Sequence[int], scales: Sequence[Tensor], operand: Operand
) -> Iterator[str]:
    if len(scales) != len(operand.levels):
        yield f"there are {len(scales)} scales for the {len(operand.levels)} levels of {operand}"
        return
    for scale, level in zip(scales, operand.levels, strict=True):
        dtype = torch.float32 if level.is_real else torch.uint8
        expected = _scale_shape(shape, level)
        if scale.dtype != dtype or list(scale.shape) != expected:
            yield f"the scale {level} is {_kind(scale)}, not {_name(dtype)} {expected}"
        elif not _all_positive(scale, level):
            yield f"the scale {level} holds values that are not finite and positive"


def _scale_shape(shape: Sequence[int], level: ScaleLevel) -> list[int]:
    if level.granularity is Granularity.TENSOR:
        return [1] * len(shape)
    return [*shape[:-1], -(-shape[-1] // level.block) if level.block else 1]


def _all_positive(scale: Tensor, level: ScaleLevel) -> bool:
    spec = level.spec
    if spec is None:
        return bool((scale.isfinite() & (scale > 0)).all())
    # Codes of positive numbers count up from the smallest; zero is below it, NaN above the largest.
    smallest = 1 if spec.zero else 0
    return bool(((scale >= smallest) & (scale <= spec.max_code)).all())


def _kind(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
