"""``quantize-weights``: replace each ``fpq.quantize`` of a weight by stored codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch_mlir import ir

from fpcompiler import numerics
from fpcompiler.errors import PassError
from fpcompiler.ir import build
from fpcompiler.ir.dialect import SCALE_SLOTS, AssembleOp, scale_slots, scale_texts
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.types import QuantizedType, quantized_type
from fpcompiler.passes.base import Pass, PassContext

_CLIPS: Final = ("max", "mse")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round the weights to nearest and pack them.

    Attributes:
        clip: How the real scale of a row is chosen: ``max`` maps the largest magnitude to the
            largest code; ``mse`` searches the clip that gives the least squared error, which is
            never more than that of ``max``. Scales of blocks follow the rounding that the operand
            names, in both cases.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    clip: str = "max"

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            PassError: If there is no such clip.
        """
        if self.clip not in _CLIPS:
            raise PassError(f"{self.name}: clip must be one of {', '.join(_CLIPS)}: {self.clip!r}")

    def run(self, program: Program, context: PassContext) -> None:
        """Quantize every weight, in program order."""
        evaluator = ConstantEvaluator(program)
        weights = [
            op
            for op in program.operations("fpq.quantize")
            if _is_constant(op.operands[0], evaluator)
        ]
        for op in context.progress(weights, len(weights), "quantizing weights"):
            tensor = evaluator.evaluate(op.operands[0].owner.operation)
            self._replace(program, op, tensor, context)

    def _replace(
        self, program: Program, op: ir.Operation, tensor: torch.Tensor, context: PassContext
    ) -> None:
        kind = quantized_type(op.results[0])
        assert kind is not None
        layer = _layer_of(op)
        clipped = numerics.clip(tensor, kind.operand, layer=layer) if self.clip == "mse" else tensor
        packed, scales = numerics.quantize_packed(clipped, kind.operand, layer=layer)
        with ir.InsertionPoint(op), op.location:
            operands = _store(program, layer, kind, (packed, *scales))
            assembled = AssembleOp(*operands, op.results[0].type).result
        op.results[0].replace_all_uses_with(assembled)
        op.erase()
        context.count("weights quantized")
        context.count("values", tensor.numel())
        context.count("bytes before", tensor.numel() * tensor.element_size())
        context.count("bytes after", sum(t.numel() * t.element_size() for t in (packed, *scales)))


def _is_constant(value: ir.Value, evaluator: ConstantEvaluator) -> bool:
    owner = value.owner
    return not isinstance(owner, ir.Block) and evaluator.is_constant(owner.operation)


def _layer_of(op: ir.Operation) -> str:
    """Return the name of the first layer that uses a quantized weight."""
    for use in op.results[0].uses:
        user = use.owner.operation
        if "layer" in user.attributes:
            return str(ir.StringAttr(user.attributes["layer"]).value)
    raise PassError("quantize-weights: a quantized weight is used by no layer; run cse before.")


def _store(
    program: Program, layer: str, kind: QuantizedType, tensors: tuple[torch.Tensor, ...]
) -> list[ir.Value]:
    """Declare and load a global for the codes and for the scales of each level."""
    parts = ("codes", *(f"{slot}_scale" for slot in scale_slots(kind)))
    texts = (kind.payload, *scale_texts(kind))
    values: dict[str, ir.Value] = {}
    for part, text, tensor in zip(parts, texts, tensors, strict=True):
        name = program.weights.unused_name(f"{layer}.weight.{part}")
        program.weights[name] = tensor
        build.declare_global(program.module.operation, name, text)
        values[part] = build.load_builtin(name, text)
    slots = ["codes", *(f"{slot}_scale" for slot in SCALE_SLOTS)]
    return [values[slot] if slot in values else build.constant(None) for slot in slots]
