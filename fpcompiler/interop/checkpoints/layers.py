"""The quantized layers of an artifact as a compressed-tensors checkpoint would store them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.artifact import Artifact
from fpcompiler.errors import ExportError, describe_layer
from fpcompiler.interop.checkpoints.arguments import InputKind, input_kind_of, layout_of
from fpcompiler.interop.checkpoints.layouts import MXFP4, NVFP4, Layout
from fpcompiler.interop.checkpoints.stored import StoredLayer, reciprocal_of
from fpcompiler.numerics import dequantize_packed
from fpcompiler.operand import Granularity, Operand
from fpcompiler.plan import Plan, Step, used_values
from fpcompiler.runtime.ops import LinearArguments

CHECKPOINT: Final = "checkpoint"
"""Key of an artifact's recipe: what an import has found in the checkpoint, see ``record_of``."""

_WEIGHTS_ONLY: Final = frozenset(
    {
        "cse", "normalize", "fold-constants", "insert-quantize", "mixed-formats", "search-formats",
        "gptq", "round-weights", "share-scales", "static-inputs", "stored-weights",
        "quantize-weights", "lower-gemm", "canonicalize", "group-heads", "fuse-quantize",
        "fuse-epilogue", "fuse-residual", "symbol-dce",
    }
)  # fmt: skip
"""Passes that change no layer but by rounding its weight and its input."""

_NAME: Final = re.compile(r'([\w-]+)(?:\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\})?(?:,|$)')
_LINEAR: Final = frozenset({"linear", "addmm", "mm", "matmul"})

FUSED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
)
"""Layers that vLLM and SGLang run as one, with one scale of the tensor."""


def stored_layers(artifact: Artifact) -> dict[str, StoredLayer]:
    """Return every quantized layer by its name.

    Raises:
        ExportError: If compressed-tensors cannot express a layer without loss, or the program is
            more than the model with its weights and inputs rounded; the message names the layer.
    """
    _require_only_rounded(artifact.pipeline)
    kinds = {row.name: row.op for row in artifact.plan.layers if row.quantized}
    producers = {out: step for step in artifact.plan.steps for out in step.outs}
    layers: dict[str, StoredLayer] = {}
    for step in artifact.plan.steps:
        if step.op != "fpc.linear" or step.layer in layers:
            continue
        if kinds.get(step.layer, "") not in _LINEAR:
            raise _refusal(
                step.layer,
                f"it is a {kinds.get(step.layer, 'part')}, and only linear layers can be stored",
            )
        layers[step.layer] = _Layer(artifact, step, producers).stored()
    if not layers:
        raise ExportError("the model has no quantized layer that a checkpoint could hold.")
    _require_fusable(layers)
    return layers


@dataclass(frozen=True)
class LayerWeight:
    """The weight of a quantized layer of an artifact, whatever its format.

    Attributes:
        name: Module path.
        operand: What the weight is.
        codes: uint8 ``[N, bytes]``, packed.
        scales: Of each level.
        k: Length of a row.
        input_outer: The static scale of the input's tensor, or None.
    """

    name: str
    operand: Operand
    codes: Tensor
    scales: tuple[Tensor, ...]
    k: int
    input_outer: Tensor | None

    def dequantized(self) -> Tensor:
        """Return the values, fp32 ``[N, K]``."""
        return dequantize_packed(self.codes, self.scales, self.operand, self.k)


def layer_weights(artifact: Artifact) -> dict[str, LayerWeight]:
    """Return the weight of every quantized layer, by name.

    Raises:
        ExportError: If one is computed by the program.
    """
    producers = {out: step for step in artifact.plan.steps for out in step.outs}
    steps = (step for step in artifact.plan.steps if step.op == "fpc.linear")
    return {step.layer: _Layer(artifact, step, producers).weight() for step in steps}


def _refusal(layer: str, why: str) -> ExportError:
    return ExportError(f"{describe_layer(layer)}: {why}.")


def _require_only_rounded(pipeline: str) -> None:
    """Check that a checkpoint, which holds weights alone, can stand for the program."""
    for match in _NAME.finditer(pipeline):
        if match[1] not in _WEIGHTS_ONLY:
            raise ExportError(
                f"the pass {match[1]} has changed what is computed between the layers, which a "
                "checkpoint of weights cannot express. Compile with a method that only rounds: "
                "rtn, mse, gptq, adaround."
            )


class _Layer:
    """One ``fpc.linear`` of a plan."""

    def __init__(self, artifact: Artifact, step: Step, producers: Mapping[str, Step]) -> None:
        self.name = step.layer
        self.artifact = artifact
        self.producers = producers
        self.call = LinearArguments(*step.args)

    def weight(self) -> LayerWeight:
        parts = self._constants(self.call.w)
        if parts is None:
            raise _refusal(self.name, "its weight is computed by the program, not stored")
        codes, *scales = parts
        operand, x_operand = self.call.w_operand, self.call.x_operand
        outer = self._static_outer(Operand.parse(x_operand)) if x_operand else None
        return LayerWeight(
            self.name, Operand.parse(operand), codes, tuple(scales), self.call.k, outer
        )

    def stored(self) -> StoredLayer:
        weight = self.weight()
        operand, codes, scales = weight.operand, weight.codes, weight.scales
        layout = self._layout(operand)
        if self.call.k % layout.block.block:
            raise _refusal(
                self.name,
                f"K = {self.call.k} is no multiple of {layout.block.block}, and {layout.name} has "
                "no short blocks",
            )
        numbers = {}
        outer = scales[0] if layout.outer else None
        if outer is not None:
            numbers[layout.outer] = self._number(layout.outer, outer, scales[-1])
        kind, input_outer = self._input(weight.input_outer)
        if input_outer is not None:
            input_outer = input_outer.reshape(1, 1)
            # Blocks of inputs have any scale, so that only a power of two will do.
            every = torch.arange(1, 0x7F, dtype=torch.uint8)
            numbers[layout.input_outer] = self._number(layout.input_outer, input_outer, every)
        return StoredLayer(
            self.name, layout, operand, codes, scales[-1], outer, kind, input_outer, numbers
        )

    def _layout(self, operand: Operand) -> Layout:
        layout = layout_of(operand)
        if layout is None:
            raise _refusal(
                self.name,
                f"compressed-tensors has no format for weights in {operand}. It has NVFP4 "
                f"({NVFP4}), MXFP4 ({MXFP4}), MXFP6 and MXFP8: compile with --scheme nvfp4 or "
                "mxfp4, or keep the layer in high precision with a rule",
            )
        return layout

    def _constants(self, argument: Any) -> list[Tensor] | None:
        names, plan = [*used_values(argument)], self.artifact.plan
        if not plan.constants.keys() >= {*names}:
            return None
        return [self.artifact.tensors[plan.constants[name]] for name in names]

    def _number(self, part: str, scale: Tensor, blocks: Tensor) -> Tensor:
        """Return what the file holds for the scale of a tensor."""
        known = self.artifact.recipe.get(CHECKPOINT, {}).get("numbers", {})
        value = known.get(f"{self.name}.{part}")
        if value is not None:
            stored = torch.tensor([value], dtype=torch.float32)
            if bool(1 / stored == scale.flatten()):
                return stored
        found = reciprocal_of(scale, blocks)
        if found is None:
            what = "weight" if part.startswith("weight") else "input"
            advice = "Compile with share_scales=True (--share-scales): then it is a power of two"
            if CHECKPOINT in self.artifact.recipe:
                advice = "It is from a checkpoint that stores the scale itself: serve that one"
            raise _refusal(
                self.name,
                f"the scale of its {what}, {float(scale):.9g}, would be stored as one over it, and "
                f"no fp32 number gives the same values. {advice}",
            )
        return found

    def _input(self, outer: Tensor | None) -> tuple[InputKind | None, Tensor | None]:
        if not self.call.x_operand:
            return None, None
        operand = Operand.parse(self.call.x_operand)
        kind = input_kind_of(operand, outer is not None)
        if kind is not None and (kind.is_static or not _has_tensor_scale(operand)):
            return kind, outer
        if _has_tensor_scale(operand) and outer is None:
            raise _refusal(
                self.name,
                "the scale of its input's tensor is computed at each call, but readers of the "
                "format want one that is stored. Compile with calibration data and "
                "static_inputs=True (--static-inputs), or for weights alone (a=none)",
            )
        raise _refusal(self.name, f"no reader of the format quantizes inputs to {operand}")

    def _static_outer(self, operand: Operand) -> Tensor | None:
        first, *scales = used_values(self.call.x)
        producer = self.producers.get(first)
        if producer is None or operand.outer is None or not scales:
            return None
        found = self._constants([{"v": scales[0]}])
        return found[0] if found else None


def _has_tensor_scale(operand: Operand) -> bool:
    return operand.outer is not None and operand.outer.granularity is Granularity.TENSOR


def _require_fusable(layers: Mapping[str, StoredLayer]) -> None:
    """Check the rules of vLLM and SGLang for layers that they run as one.

    They take one scale of the tensor for all of these, the largest: where they differ, the others
    come out wrong, and nothing but a line in a log tells.
    """
    for group in fused_groups(layers):
        first = layers[group[0]]
        for name in group[1:]:
            other = layers[name]
            if (other.layout, other.input) != (first.layout, first.input):
                raise _refusal(
                    name,
                    f"it is quantized otherwise than {group[0]!r}, with which vLLM runs it as one "
                    "layer. Give both the same formats",
                )
            for part, number in first.numbers.items():
                if float(other.numbers[part]) != float(number):
                    raise _refusal(
                        name,
                        f"its {part} is not that of {group[0]!r}, with which vLLM runs it as one "
                        "layer. Compile with share_scales=True (--share-scales)",
                    )


def fused_groups(names: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the layers that are run as one, two or more of those that there are."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for parent in parents:
        for members in FUSED:
            found = [f"{parent}.{m}" if parent else m for m in members]
            found = [name for name in found if name in names]
            if len(found) > 1:
                yield found


def kept_layers(plan: Plan) -> list[str]:
    """Return the linear layers of a plan that are not quantized."""
    return [row.name for row in plan.layers if not row.quantized and row.op in _LINEAR]


def dtype_of(plan: Plan) -> str:
    """Return the dtype that the quantized layers of a plan give."""
    given = (LinearArguments(*s.args).dtype for s in plan.steps if s.op == "fpc.linear")
    return Counter(str(dtype["dtype"]) for dtype in given).most_common(1)[0][0]


def record_of(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """Return what an import keeps in the recipe: the stored reciprocals, bit for bit."""
    return {
        "numbers": {
            f"{layer.name}.{part}": float(number)
            for layer in layers.values()
            for part, number in layer.numbers.items()
            if layer.layout.reciprocal
        }
    }
