"""Operators of torch with the same result on every machine.

How a sum is ordered, and which function of a library computes a cosine, differs between a CPU and
a GPU, and between two CPUs. Rounding activations to a few bits makes much of the last bit
(``examples/benchmarks/sensitivity.py``), so two machines soon write different texts, both as good.
What is computed here in fp64 and rounded once is the same everywhere, unless two results that
differ by 1e-15 lie on both sides of a middle. Which of several equal numbers comes first is not
settled by that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fpcompiler.errors import OptionError, describe_layer
from fpcompiler.operand import Operand
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.cuda.fragments import Mode, mode_of
from fpcompiler.runtime.operators import Function, aliases
from fpcompiler.runtime.ops import LINEAR_STEP, LinearArguments

__all__ = ["EXACT", "Widened", "reproducible", "warn_of_inexact_layers"]

_LOG: Final = logging.getLogger("fpcompiler.runtime")

EXACT: Final = frozenset(
    {
        # Elements are moved or chosen.
        "_to_copy", "_unsafe_index", "amax", "amin", "argmax", "argmin", "cat", "clone",
        "constant_pad_nd", "contiguous", "embedding", "flip", "gather", "index", "index_copy",
        "index_put", "index_select", "lift_fresh_copy", "masked_fill", "max", "min", "pad",
        "repeat", "repeat_interleave", "roll", "scatter", "select_scatter", "slice_scatter",
        "sort", "stack", "tile", "to", "topk", "tril", "triu", "where",
        # They are made.
        "empty", "eye", "full", "full_like", "new_empty", "new_full", "new_ones", "new_zeros",
        "ones", "ones_like", "scalar_tensor", "zeros", "zeros_like",
        # They are compared.
        "eq", "ge", "gt", "isfinite", "isinf", "isnan", "le", "lt", "ne", "sign",
        # They are computed from one another, and rounded once.
        "abs", "add", "ceil", "clamp", "clamp_max", "clamp_min", "floor", "maximum", "minimum",
        "mul", "neg", "nextafter", "reciprocal", "relu", "round", "rsub", "sqrt", "sub", "trunc",
    }
)  # fmt: skip
"""Operators of aten, without their overload, with the same bits on every machine as they are. A GPU
divides by a number by multiplying, and counts in steps otherwise than a CPU, so those are not."""

_NARROW: Final = frozenset(
    {
        "_grouped_mm", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
    }
)  # fmt: skip
"""Those that torch has not in fp64."""


def reproducible(step: Step, function: Function) -> Function:
    """Return what runs a step with the same result on every machine.

    Operators of fpcompiler are left as they are. Quantizers of the native library and those of GPUs
    compute in the same order, activations included, and layers of integers are exact. Others are
    not the same: see :func:`warn_of_inexact_layers`.

    Args:
        step: The step.
        function: What runs it otherwise.

    Raises:
        OptionError: If torch cannot compute it in fp64.
    """
    namespace, _, name = step.op.partition(".")
    base, _, overload = name.partition(".")
    if namespace != "aten" or base.startswith("sym_") or aliases(function):
        return function
    if base in _NARROW:
        raise OptionError(
            f"reproducible=True: {describe_layer(step.layer)} needs {step.op}, which torch has not "
            "in fp64. Load the model without it."
        )
    return function if base in EXACT and _is_exact(step, base, overload) else Widened(function)


def _is_exact(step: Step, base: str, overload: str) -> bool:
    third = step.args[2] if len(step.args) > 2 else None
    if base in ("add", "sub", "rsub"):
        # x + alpha * y is rounded once or twice.
        return bool(step.kwargs.get("alpha", 1 if third is None else third) == 1)
    accumulates = step.kwargs.get("accumulate") or (len(step.args) > 3 and step.args[3])
    return not (base == "index_put" and accumulates) and "reduce" not in overload


def warn_of_inexact_layers(plan: Plan) -> None:
    """Log which quantized layer may be different on another machine, if there is one."""
    for step in plan.steps:
        if step.op != LINEAR_STEP:
            continue
        given = LinearArguments(*step.args)
        activation = Operand.parse(given.x_operand) if given.x_operand else None
        if mode_of(Operand.parse(given.w_operand), activation) is not Mode.INTEGERS:
            _LOG.warning(
                "reproducible=True: the sums of %s (w=%s, a=%s) are rounded, in an order that "
                "differs between machines. Those of w4a6-row and w4a4-row are exact.",
                describe_layer(given.layer), given.w_operand, given.x_operand or "none",
            )  # fmt: skip
            return


@dataclass(frozen=True, eq=False)
class Widened:
    """An operator that is computed in fp64; results get the type that they have otherwise.

    Attributes:
        function: The operator.
    """

    function: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the operator returns, rounded once."""
        dtype = _type_of(args, kwargs)
        if dtype is None:
            result = self.function(*args, **kwargs)
            dtype = _type_of((result,), {})
            if dtype is None:
                return result
            # Torch makes numbers of its default type of integers.
            args, kwargs = tree_map_only(Tensor, _as_real, (args, kwargs))
        args, kwargs = tree_map(_widened, (args, kwargs))
        result = self.function(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: _narrowed(x, dtype), result)


def _type_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """Return the type that is asked for, or that of the tensors; None if it has no fractions."""
    leaves = tree_leaves((args, kwargs))
    asked = [x for x in leaves if isinstance(x, torch.dtype)]
    dtypes = asked or [x.dtype for x in leaves if isinstance(x, Tensor)]
    dtypes = [x for x in dtypes if x.is_floating_point or x.is_complex]
    return reduce(torch.promote_types, dtypes) if dtypes else None


def _as_real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.double()


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(_widened(x.dtype))
    if not isinstance(x, torch.dtype):
        return x
    return torch.float64 if x.is_floating_point else torch.complex128 if x.is_complex else x


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_complex():
        return x.to(dtype if dtype.is_complex else dtype.to_complex())
    return x.to(dtype.to_real() if dtype.is_complex else dtype) if x.is_floating_point() else x
