"""The roofline of the quantized layers: how long each takes, and how long it would have to.

A layer reads its packed weights, their scales, its bias, its activations and what it adds to its
result once, and does
``2 * M * N * K`` operations. The machine needs at least the longer of both times, its bound
(S. Williams et al., "Roofline: an insightful visual performance model", CACM 2009).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fpcompiler import native
from fpcompiler.native.linear import Arithmetic
from fpcompiler.numerics import packed_bytes
from fpcompiler.operand import Operand
from fpcompiler.plan import Step
from fpcompiler.runtime.arithmetic import BF16_INSTRUCTIONS, arithmetic_for
from fpcompiler.runtime.ceilings import Ceilings
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.native import PreparedInput
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.ops import LINEAR_STEP, LinearArguments, scale_shape


@dataclass(frozen=True)
class LinearCall:
    """One run of a quantized layer.

    Attributes:
        result: Name of its result in the plan.
        layer: Module path of the layer.
        m: Rows of activations; all tokens of a batch.
        n: Output channels.
        k: Input channels.
        arithmetic: The fastest that holds every value exactly.
        weight_bytes: Bytes of the packed weight, its scales and its bias.
        activation_bytes: Bytes of the activations as the operator gets them, scales included, and
            of the residual.
    """

    result: str
    layer: str
    m: int
    n: int
    k: int
    arithmetic: Arithmetic
    weight_bytes: int
    activation_bytes: int

    @property
    def bytes_read(self) -> int:
        """Bytes of all operands."""
        return self.weight_bytes + self.activation_bytes

    @property
    def operations(self) -> int:
        """Products and sums."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class RooflineRow:
    """A run of a layer against the bound of the machine; ``limit`` names what the bound is."""

    call: LinearCall
    seconds: float
    bound_seconds: float
    limit: str

    @property
    def fraction(self) -> float:
        """Part of the bound that is reached; 1 is as fast as the machine can be."""
        return self.bound_seconds / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        call = asdict(self.call) | {"arithmetic": self.call.arithmetic.name.lower()}
        sizes = {"bytes_read": self.call.bytes_read, "operations": self.call.operations}
        times = {"seconds": self.seconds, "bound_seconds": self.bound_seconds}
        return {**call, **sizes, **times, "limit": self.limit, "fraction": self.fraction}


def linear_calls(executor: Executor, leaves: Sequence[Tensor]) -> tuple[LinearCall, ...]:
    """Run once, and return the calls of quantized layers in the order of the program.

    Raises:
        RunError: If the tensors do not fit, or a step fails.
    """
    found: list[LinearCall] = []

    def watch(
        step: Step, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> object:
        result = function(*args, **kwargs)
        if step.op == LINEAR_STEP:
            found.append(_linear_call(step, args, result))
        return result

    executor.run_leaves(leaves, caller=watch)
    return tuple(found)


def _linear_call(step: Step, args: Sequence[Any], result: Tensor) -> LinearCall:
    given, n = LinearArguments(*args), result.shape[-1]
    x, k, bias = given.x, given.k, given.bias
    x_operand = Operand.parse(given.x_operand) if given.x_operand else None
    w_operand = Operand.parse(given.w_operand)
    dtype = result.dtype if x_operand else x[0].dtype
    return LinearCall(
        result=step.outs[0],
        layer=step.layer,
        m=result.numel() // n,
        n=n,
        k=k,
        arithmetic=arithmetic_for(x_operand, w_operand, k, dtype, _instructions(result.device)),
        weight_bytes=packed_weight_bytes(w_operand, n, k) + _bytes([bias]),
        activation_bytes=_bytes([*x, given.residual]),
    )


def packed_weight_bytes(operand: Operand, n: int, k: int) -> int:
    """Return the bytes of a packed weight ``[n, k]`` with its scales."""
    total = n * packed_bytes(k, operand.format.storage_bits)
    for level in operand.levels:
        total += math.prod(scale_shape((n, k), level)) * (4 if level.is_real else 1)
    return total


def _bytes(values: Iterable[object]) -> int:
    # A backend may pass activations on in a form of its own.
    parts = (part.memory if isinstance(part, PreparedInput) else part for part in values)
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _instructions(device: torch.device) -> int:
    found = native.library() if device.type == "cpu" else None
    return BF16_INSTRUCTIONS if found is None else found.instructions


def roofline(
    calls: Sequence[LinearCall], seconds: Sequence[float], ceilings: Ceilings
) -> tuple[RooflineRow, ...]:
    """Return each call against the bound.

    Args:
        calls: The calls.
        seconds: How long each took.
        ceilings: Of the machine. Memory counts as fast as for a working set of the model's size.
    """
    return tuple(_row(call, time, ceilings) for call, time in zip(calls, seconds, strict=True))


def _row(call: LinearCall, seconds: float, ceilings: Ceilings) -> RooflineRow:
    arithmetic = call.arithmetic.name.lower()
    reading = call.bytes_read / ceilings.set_read
    computing = call.operations / ceilings.peaks[arithmetic]
    limit = "memory" if reading >= computing else arithmetic
    return RooflineRow(call, seconds, max(reading, computing), limit)
