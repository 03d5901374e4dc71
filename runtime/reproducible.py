"""Operators of torch with the same result on every machine.

How a sum is ordered, and which function of a library computes a cosine, differs between a CPU and
a GPU, and between two CPUs. Rounding activations to a few bits makes much of the last bit
(``examples/benchmarks/sensitivity.py``), so two machines soon write different texts, both as good.
What is computed here in fp64 and rounded once is the same everywhere, unless two results that
differ by 1e-15 lie on both sides of a middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fpcompiler.plan import Step
from fpcompiler.runtime.operators import Function, aliases

__all__ = ["EXACT", "Widened", "reproducible"]

EXACT: Final = frozenset(
    {
        # Elements are moved or chosen.
        "_to_copy", "_unsafe_index", "amax", "amin", "argmax", "argmin", "cat", "clone",
        "constant_pad_nd", "contiguous", "embedding", "flip", "gather", "index", "index_copy",
        "index_put", "index_select", "lift_fresh_copy", "masked_fill", "max", "min", "pad",
        "repeat", "repeat_interleave", "roll", "scatter", "select_scatter", "slice_scatter",
        "sort", "stack", "tile", "to", "topk", "tril", "triu", "where",
        # They are made.
        "arange", "empty", "eye", "full", "full_like", "new_empty", "new_full", "new_ones",
        "new_zeros", "ones", "ones_like", "scalar_tensor", "zeros", "zeros_like",
        # They are computed from one another, and rounded once.
        "abs", "add", "bitwise_not", "ceil", "clamp", "clamp_max", "clamp_min", "div", "floor",
        "maximum", "minimum", "mul", "neg", "reciprocal", "relu", "round", "rsub", "sign", "sqrt",
        "sub", "trunc",
    }
)  # fmt: skip
"""Operators of aten, without their overload, with the same bits on every machine as they are."""


def reproducible(step: Step, function: Function) -> Function:
    """Return what runs a step with the same result on every machine.

    Operators of fpcompiler are left as they are. Quantizers of the native library and those of GPUs
    compute in the same order, activations included, and layers of integers are exact. Other layers
    are not the same.

    Args:
        step: The step.
        function: What runs it otherwise.
    """
    namespace, _, name = step.op.partition(".")
    base = name.partition(".")[0]
    if namespace != "aten" or base.startswith("sym_") or aliases(function):
        return function
    # x + alpha * y is rounded once or twice.
    if base in EXACT and step.kwargs.get("alpha", 1) == 1:
        return function
    return Widened(function)


@dataclass(frozen=True, eq=False)
class Widened:
    """An operator that is computed in fp64; results get the type that they have otherwise.

    Attributes:
        function: The operator.
    """

    function: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the operator returns, rounded once."""
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        dtypes = [x.dtype for x in tensors if x.is_floating_point()]
        if not dtypes:
            return self.function(*args, **kwargs)
        dtype = kwargs.get("dtype") or reduce(torch.promote_types, dtypes)
        if kwargs.get("dtype"):
            kwargs = {**kwargs, "dtype": torch.float64}
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        result = self.function(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: _narrowed(x, dtype), result)


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
