"""``QuantizationArgs`` of compressed-tensors and what they mean: an operand, or nothing we know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fpcompiler.interop.checkpoints.layouts import COMPRESSED, Layout, same_values
from fpcompiler.operand import Operand

_IGNORED: Final = frozenset({"observer", "observer_kwargs", "zp_dtype", "scale_dtype"})
"""How scales were found, and the types of tensors, which the layout fixes."""


@dataclass(frozen=True)
class InputKind:
    """What inputs are quantized to, and the arguments that say so.

    Attributes:
        operand: Element format and scale levels.
        arguments: Those of compressed-tensors that are not their defaults.
        is_static: Whether the scale of the tensor is stored.
    """

    operand: Operand
    arguments: Mapping[str, Any]
    is_static: bool = False


_DEFAULTS: Final[Mapping[str, Any]] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
}


def _float(bits: int, strategy: str, group: int | None, dynamic: bool | str) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": "float", "strategy": strategy, "group_size": group,
        "dynamic": dynamic,
    }  # fmt: skip


_MX: Final = "block32:f8E8M0FNU:floor"  # the rule of OCP MX; no config names another one

INPUTS: Final = (
    InputKind(
        Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN"),
        _float(4, "tensor_group", 16, "local"),
        is_static=True,
    ),
    InputKind(
        Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN"), _float(4, "tensor_group", 16, True)
    ),
    InputKind(Operand.parse(f"f4E2M1FN@{_MX}"), _float(4, "group", 32, True)),
    InputKind(Operand.parse(f"f6E2M3FN@{_MX}"), _float(6, "group", 32, True)),
    InputKind(Operand.parse(f"f8E4M3FN@{_MX}"), _float(8, "group", 32, True)),
    InputKind(Operand.parse("f8E4M3FN@block128:f32"), _float(8, "group", 128, True)),
    InputKind(Operand.parse("f8E4M3FN@token:f32"), _float(8, "token", None, True)),
)
"""What inputs can be quantized to in a checkpoint."""


def weight_arguments(layout: Layout) -> dict[str, Any]:
    """Return the arguments that describe the weights of a format."""
    strategy = "tensor_group" if layout.outer else "group"
    bits = layout.operand.format.storage_bits
    dtype = "torch.float8_e4m3fn" if layout.outer else "torch.uint8"
    known = _float(bits, strategy, layout.block.block, False)
    return {**known, "symmetric": True, "scale_dtype": dtype}


def input_arguments(kind: InputKind) -> dict[str, Any]:
    """Return the arguments that describe an input."""
    level = kind.operand.block
    written = {**kind.arguments, "symmetric": True}
    if level is not None and level.format != "f32":
        is_power = level.format == "f8E8M0FNU"
        written["scale_dtype"] = "torch.uint8" if is_power else "torch.float8_e4m3fn"
    return written


def input_kind_of(operand: Operand, is_static: bool) -> InputKind | None:
    """Return how a checkpoint describes an input, or None if it cannot."""
    kinds = (k for k in INPUTS if k.operand == operand and k.is_static == is_static)
    return next(kinds, None)


def parse_input(arguments: Mapping[str, Any]) -> InputKind | str:
    """Return what the arguments of an input mean, or the reason why nothing."""
    found = _known(arguments)
    if isinstance(found, str):
        return found
    for kind in INPUTS:
        if found == {**_DEFAULTS, **kind.arguments}:
            wide = kind.operand.block and kind.operand.block.block == 32
            if wide and arguments.get("scale_dtype") not in (None, "torch.uint8"):
                return f"scale_dtype is {arguments['scale_dtype']!r}, not torch.uint8"
            return kind
    return f"nothing is known that quantizes like {_described(found)}"


def mismatch_of_weight(arguments: Mapping[str, Any], layout: Layout) -> str:
    """Return why arguments do not describe the weights of a format; empty if they do."""
    found = _known(arguments)
    if isinstance(found, str):
        return found
    expected = {**_DEFAULTS, **_known_weight(layout)}
    wrong = [name for name in expected if found[name] != expected[name]]
    if not wrong:
        return ""
    some = ", ".join(f"{name} is {found[name]!r}, not {expected[name]!r}" for name in wrong)
    return f"{layout.name} does not hold such weights: {some}"


def layout_of(operand: Operand) -> Layout | None:
    """Return the format of compressed-tensors that holds an operand without loss."""
    return next((row for row in COMPRESSED if same_values(row.operand, operand)), None)


def _known_weight(layout: Layout) -> dict[str, Any]:
    arguments = weight_arguments(layout)
    return {key: arguments[key] for key in _DEFAULTS if key in arguments}


def _known(arguments: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return all arguments that matter with their defaults, or what is wrong with them."""
    unknown = sorted(arguments.keys() - _DEFAULTS.keys() - _IGNORED)
    if unknown:
        return f"the argument {unknown[0]!r} is not known"
    values = {**_DEFAULTS, **{k: v for k, v in arguments.items() if k in _DEFAULTS}}
    if values["strategy"] is None and values["group_size"]:
        values["strategy"] = "group"
    return values


def _described(values: Mapping[str, Any]) -> str:
    changed = {k: v for k, v in values.items() if v != _DEFAULTS[k]}
    return ", ".join(f"{k}={v!r}" for k, v in changed.items())
