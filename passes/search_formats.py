"""``search-formats``: choose formats and scales by the error they make on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch_mlir import ir

from fpcompiler import target as targets
from fpcompiler.calibration import Group, InputStatistics, SquaredGradients, input_groups
from fpcompiler.ir.dialect import EncodeOp, QuantizeOp
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.stored import store_scales
from fpcompiler.ir.types import QuantizedType, quantized_type
from fpcompiler.numerics import search
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext, add_note, pass_text
from fpcompiler.passes.candidates import CHOICES, check_choice, for_input, for_weights
from fpcompiler.passes.weights import OpenWeight, OpenWeights
from fpcompiler.target import Target

_MODES: Final = ("default", "faithful")
_OBJECTIVES: Final = ("mse", "fisher")
_INPUTS: Final = ("search", "keep")


@dataclass(frozen=True)
class SearchFormats(Pass):
    """Search formats and clips, layer by layer (LLM-FP4, arXiv 2310.16836).

    Layers that share an input are searched together, with the inputs of the original model. An
    input with a scale per tensor gets a static one, if its weights have one scale per row. Other
    scales of inputs stay as they are computed at each call, and the format is chosen. Weights get
    scales per row, or per block, that make the error of the output small. What the target cannot
    run is not tried.

    Attributes:
        mode: ``default``, whose grid of clips does not depend on the scale of the tensors and which
            is never worse than rounding to nearest; or ``faithful``, the published search.
        objective: What is made small: ``mse``, the squared error of the layers' outputs; or
            ``fisher``, the same weighted with squared gradients of the model's output, as the paper
            does for BERT and ViT. It runs the model backwards, a batch at a time.
        formats: ``same-bits`` chooses among the formats that are as wide as the given one;
            ``given`` keeps it.
        inputs: ``keep`` leaves inputs as they are, and searches the weights for inputs that are not
            quantized: for a pass that comes after and decides about the inputs.
        target: Name of the target.
    """

    name: ClassVar[str] = "search-formats"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    mode: str = "default"
    objective: str = "mse"
    formats: str = "same-bits"
    inputs: str = "search"
    target: str = "reference"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If there is no such mode, objective, or choice of formats or inputs.
        """
        known = {
            "mode": _MODES, "objective": _OBJECTIVES, "formats": CHOICES, "inputs": _INPUTS,
        }  # fmt: skip
        for option, values in known.items():
            check_choice(self.name, option, getattr(self, option), values)

    def run(self, program: Program, context: PassContext) -> None:
        """Search and rewrite every group of layers.

        Raises:
            PassError: If there is no calibration data.
            NumericsError: If a weight or an input holds NaN or infinity; the layer is named.
        """
        every = input_groups(program)
        weights = OpenWeights(program, every)
        groups = [group for group in every if weights.own(group) and not weights.folded(group)]
        context.count("groups left: shifted already", sum(map(weights.folded, every)))
        results = self._results(program, context, groups, weights)
        for group in groups:
            _Rewriter(program, group, results[group.name], context).run(weights.own(group))

    def _results(
        self,
        program: Program,
        context: PassContext,
        groups: Sequence[Group],
        weights: OpenWeights,
    ) -> Mapping[str, Mapping[str, Tensor]]:
        calibration, text = context.calibrated(self.name), pass_text(self)
        work = partial(self._search, weights, targets.lookup(self.target))
        with ExitStack() as stack:
            if self.objective == "fisher":
                gradients = stack.enter_context(
                    calibration.squared_gradients(program, label=text, progress=context.progress)
                )
                work = partial(work, gradients=gradients)
            return calibration.visit(program, groups, work, label=text, progress=context.progress)

    def _search(
        self,
        weights: OpenWeights,
        target: Target,
        group: Group,
        statistics: InputStatistics,
        gradients: SquaredGradients | None = None,
    ) -> dict[str, Tensor]:
        device = statistics.gram.device
        own = weights.own(group)
        fisher = None if gradients is None else [gradients.of(weight.layer) for weight in own]
        given = None if group.quantize is None else _operand(group.quantize)
        decision = search.search_shared(
            statistics.sample,
            statistics.gram,
            [weights.value(weight).to(device) for weight in own],
            *self._possible(target, [weight.operand for weight in own], given),
            search.search_layer_faithful if self.mode == "faithful" else search.search_layer,
            fisher=fisher,
            layer=group.name,
        )
        return _encoded(decision)

    def _possible(
        self, target: Target, weights: Sequence[Operand], given: Operand | None
    ) -> tuple[list[list[Operand]], list[Operand]]:
        """Return candidates for each weight and for the input; any of them go together."""
        lists = for_weights(target, weights, given, self.formats)
        if given is None or self.inputs == "keep":
            return lists, []
        every = {weight for own in lists for weight in own}
        return lists, for_input(target, list(every), given, self.formats)


def _operand(op: ir.Operation) -> Operand:
    kind = quantized_type(op.results[0])
    assert kind is not None
    return kind.operand


def _encoded(decision: search.Decision) -> dict[str, Tensor]:
    """Return a decision as tensors, operands as the bytes of their text."""
    result = {"losses": torch.tensor([decision.rtn_loss, decision.loss], dtype=torch.float64)}
    if decision.activation is not None:
        result["input"] = _bytes(str(decision.activation))
    if decision.activation_scale is not None:
        result["input.scale"] = decision.activation_scale
    for number, (operand, scales) in enumerate(decision.weights):
        result[f"{number}"] = _bytes(str(operand))
        result |= {f"{number}.scale{level}": scale for level, scale in enumerate(scales)}
    return result


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()


class _Rewriter:
    """Puts what was found for one group into the program."""

    def __init__(
        self, program: Program, group: Group, found: Mapping[str, Tensor], context: PassContext
    ) -> None:
        self.program = program
        self.group = group
        self.found = found
        self.context = context

    def run(self, weights: Sequence[OpenWeight]) -> None:
        """Rewrite the input and the weights."""
        for number, weight in enumerate(weights):
            self._weight(number, weight)
        if self.group.quantize is not None and "input" in self.found:
            self._input(self.group.quantize)
        rtn, loss = self.found["losses"].tolist()
        for layer in self.group.layers:
            add_note(layer, f"searched: output error {loss / rtn if rtn else 1.0:.2f} of rtn")
        self.context.count("groups of layers searched")
        self.context.count("groups better than round to nearest", int(loss < rtn))

    def _weight(self, number: int, weight: OpenWeight) -> None:
        operand = Operand.parse(_text(self.found[f"{number}"]))
        scales = [self.found[f"{number}.scale{i}"] for i in range(len(operand.levels))]
        kind = QuantizedType(weight.kind.shape, operand)
        self._replace(weight.op, kind, f"{weight.layer}.weight", scales)
        self.context.count(f"weights in {operand.format}")

    def _input(self, op: ir.Operation) -> None:
        before = quantized_type(op.results[0])
        assert before is not None
        operand = Operand.parse(_text(self.found["input"]))
        kind = QuantizedType(before.shape, operand)
        self.context.count(f"inputs in {operand.format}")
        if "input.scale" not in self.found:
            self._replace(op, kind, "", ())
            return
        scale = self.found["input.scale"].view((1,) * len(before.shape))
        self._replace(op, kind, f"{self.group.name}.input", (scale,))

    def _replace(
        self, op: ir.Operation, kind: QuantizedType, name: str, scales: Sequence[Tensor]
    ) -> None:
        with ir.InsertionPoint(op), op.location:
            if scales:
                values = store_scales(self.program, name, kind, scales)
                new = EncodeOp(op.operands[0], *values, kind.to_mlir()).result
            else:
                new = QuantizeOp(op.operands[0], kind.to_mlir()).result
        op.results[0].replace_all_uses_with(new)
        op.erase()
