"""``fpq.fused_quantize``: a norm or an activation, and the quantize that alone reads it, as one.

Beside the dialect itself, whose file would be too long with it; loading the dialect loads it.
"""

# No "from __future__ import annotations": the operation is built from the annotations as objects.
# mypy: disable-error-code="call-arg, name-defined, misc"
import math
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects.ext import Operand, Pure, Result

from fpcompiler.ir.dialect import (
    FLOATS,
    Fpq,
    Quantized,
    VerifyError,
    check_operation,
    check_quantize,
)
from fpcompiler.ir.types import TensorType, shape_text, tensor_type
from fpcompiler.runtime.fused import PRODUCERS, SLOTS


class FusedQuantizeOp(Fpq.Operation, name="fused_quantize", traits=[Pure]):
    """``fpq.fused_quantize``: what :mod:`fpcompiler.runtime.fused` defines, of ``producer``.

    A tensor that the producer does not read is ``torch.constant.none``, as in ``fpq.assemble``.
    """

    input: Operand[Any]
    weight: Operand[Any]
    bias: Operand[Any]
    scale: Operand[Any]
    shift: Operand[Any]
    producer: ir.StringAttr
    eps: ir.FloatAttr
    result: Result[Quantized]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check the producer, what it reads, and the quantized result."""
        return check_operation(op, _check)


def broadcasts(small: TensorType, large: TensorType) -> bool:
    """Return whether a factor or a term fits a value without making it larger.

    The last axis must be the same. Sizes that are both known only at run time pass.
    """
    offset = len(large.shape) - len(small.shape)
    if offset < 0 or not small.shape or small.shape[-1] != large.shape[-1]:
        return False
    return all(a in (1, b) for a, b in zip(small.shape, large.shape[offset:], strict=True))


def _check(op: ir.Operation) -> None:
    check_quantize(op)
    producer = PRODUCERS.get(ir.StringAttr(op.attributes["producer"]).value)
    if producer is None:
        raise VerifyError(f"there is no producer {op.attributes['producer']}")
    source = tensor_type(op.operands[0])
    assert source is not None
    values = zip(SLOTS, (tensor_type(value) for value in list(op.operands)[1:]), strict=True)
    given = {name: kind for name, kind in values if kind is not None}
    problem = producer.problem(frozenset(given))
    if problem:
        raise VerifyError(problem)
    for name, kind in {"input": source, **given}.items():
        _check_slot(name, kind, source)
    eps = ir.FloatAttr(op.attributes["eps"]).value
    if not math.isfinite(eps) or eps < 0:
        raise VerifyError(f"eps must be finite and not negative, not {eps}")


def _check_slot(name: str, kind: TensorType, source: TensorType) -> None:
    if kind.element not in FLOATS:
        raise VerifyError(f"{name} must hold {', '.join(FLOATS)}, not {kind.element}")
    per_channel = name not in ("weight", "bias") or kind.shape == source.shape[-1:]
    if not per_channel or not broadcasts(kind, source):
        raise VerifyError(
            f"{name}: shape {shape_text(kind.shape)} does not fit {shape_text(source.shape)}"
        )
