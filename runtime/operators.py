"""From the names in a plan to what runs: which operators a plan may use, and their arguments.

A plan comes from a file, so an operator is refused unless it is known to be a pure function of its
arguments: it writes to none, opens no file, and takes no text except the options listed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch

import fpcompiler.runtime.ops  # noqa: F401  (registers torch.ops.fpc)
from fpcompiler.errors import ArtifactError
from fpcompiler.plan import DTYPES, Argument

Function: TypeAlias = Callable[..., Any]

_SCALAR_FUNCTIONS: Final[Mapping[str, Function]] = MappingProxyType(
    {
        "add": operator.add,
        "sub": operator.sub,
        "mul": operator.mul,
        "floordiv": operator.floordiv,
        "truediv": operator.truediv,
        "mod": operator.mod,
        "pow": operator.pow,
        "neg": operator.neg,
        "eq": operator.eq,
        "ne": operator.ne,
        "lt": operator.lt,
        "le": operator.le,
        "gt": operator.gt,
        "ge": operator.ge,
        "getitem": operator.getitem,
        "sym_max": torch.sym_max,
        "sym_min": torch.sym_min,
        "sym_float": torch.sym_float,
    }
)

FPC_OPERATORS: Final = (
    "quantize", "fused_quantize", "quantize_within", "encode", "dequantize", "fold", "hadamard",
    "linear", "pack", "unpack",
)  # fmt: skip
"""Operators of the namespace ``fpc``."""

QUANTIZERS: Final = frozenset({"fpc.quantize", "fpc.fused_quantize"})
"""Those in a plan that return ``[codes, *scales]``, a list also where there are no scales."""

_TEXT_ARGUMENTS: Final = frozenset(
    {
        "approximate", "equation", "indexing", "interpolation", "mode", "norm", "ord", "padding",
        "padding_side", "pad_mode", "reduce", "rounding_mode", "side",
    }
)  # fmt: skip
"""Names of the text arguments of aten operators that select a variant of the computation."""

_PRIVATE: Final = frozenset(
    {
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_cdist_forward", "_convolution",
        "_embedding_bag", "_embedding_bag_forward_only", "_euclidean_dist", "_fft_c2c", "_fft_c2r",
        "_fft_r2c", "_grouped_mm", "_local_scalar_dense", "_log_softmax",
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_safe_softmax",
        "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_shape_as_tensor", "_softmax", "_to_copy", "_trilinear", "_unsafe_index", "_unsafe_view",
        "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_weight_norm",
        "_weight_norm_interface",
    }
)  # fmt: skip
"""Those with a leading underscore that torch.export leaves in graphs; the others stay private."""

_LOGICAL: Final = frozenset({"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"})
"""Operators of aten that are named like Python's."""

_REFUSED: Final = frozenset({"from_file", "resize", "record_stream", "set", "set_data"})

_MEMORY_FORMATS: Final = (
    "contiguous_format",
    "preserve_format",
    "channels_last",
    "channels_last_3d",
)


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the value of this name."""

    name: str


def resolve(op: str) -> Function:
    """Return the function that an operator's name in a plan stands for.

    Raises:
        ArtifactError: If there is no such operator, or a plan may not use it.
    """
    namespace, _, name = op.partition(".")
    if namespace == "py" and name in _SCALAR_FUNCTIONS:
        return _SCALAR_FUNCTIONS[name]
    if namespace == "fpc" and name in FPC_OPERATORS:
        overload: Function = getattr(torch.ops.fpc, name).default
        return overload
    if namespace == "aten":
        return _resolve_aten(name)
    raise ArtifactError(f"The plan uses {op}, which this fpcompiler does not have. {_NEXT}")


_NEXT: Final = "Install the fpcompiler and torch that wrote the artifact, or compile again."


def _resolve_aten(name: str) -> torch._ops.OpOverload:
    base, _, variant = name.partition(".")
    # Python's own attributes of the namespace are no operators; these five are.
    known = not base.startswith("__") or base in _LOGICAL
    packet = getattr(torch.ops.aten, base, None) if known else None
    overload = getattr(packet, variant, None) if packet is not None else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise ArtifactError(f"The plan uses aten.{name}, which torch does not have. {_NEXT}")
    problem = _objection(base, overload._schema)
    if problem:
        raise ArtifactError(
            f"The plan uses aten.{name}, which {problem}; such operators are refused. The artifact "
            "was not written by fpcompiler, or by another version."
        )
    return overload


def _objection(base: str, schema: torch._C.FunctionSchema) -> str:
    private = base.startswith("_") and base not in _PRIVATE and base not in _LOGICAL
    if base in _REFUSED or private:
        return "is not a plain computation"
    if schema.is_mutable:
        return "writes to its arguments"
    texts = [a.name for a in schema.arguments if "str" in str(a.type)]
    if not _TEXT_ARGUMENTS.issuperset(texts):
        return f"takes the text {texts[0]!r}"
    return "" if schema.returns else "returns nothing"


def aliases(function: Function) -> bool:
    """Return whether a result may share memory with an argument."""
    if isinstance(function, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in function._schema.returns)
    return function is operator.getitem


def decode(argument: Argument, device: torch.device) -> Any:
    """Return the Python value of an encoded argument; values by name become :class:`Ref`.

    Raises:
        ArtifactError: If it names an unknown dtype, layout or memory format.
    """
    if isinstance(argument, list | tuple):
        return [decode(item, device) for item in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, text),) = argument.items()
    if kind == "v":
        return Ref(text)
    if kind == "device":
        return device
    if kind == "dtype" and text in DTYPES:
        return getattr(torch, text)
    if kind == "layout" and text == "strided":
        return torch.strided
    if kind == "memory_format" and text in _MEMORY_FORMATS:
        return getattr(torch, text)
    if kind == "f" and text in ("inf", "-inf", "nan"):
        return float(text)
    raise ArtifactError(f"The plan has the argument {kind} = {text!r}, which is unknown. {_NEXT}")


def fill(argument: Any, values: Mapping[str, Any]) -> Any:
    """Return a decoded argument with every :class:`Ref` replaced by its value."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, list):
        return [fill(item, values) for item in argument]
    return argument
