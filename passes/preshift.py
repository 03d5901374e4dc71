"""``preshift``: one real scale for channels of different range, and a power of two for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch_mlir import ir

from fpcompiler import target as targets
from fpcompiler.calibration import Calibration, Group, InputStatistics, input_groups
from fpcompiler.errors import PassError
from fpcompiler.formats import FloatSpec, parse_format
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.stored import given_scales
from fpcompiler.ir.types import tensor_type
from fpcompiler.numerics import preshift
from fpcompiler.numerics.preshift import ShiftRounding
from fpcompiler.numerics.shift_lowering import Buckets, bucket_permutation
from fpcompiler.numerics.shift_search import channel_ranges, search_powers, search_rho
from fpcompiler.operand import Granularity, Operand
from fpcompiler.passes.absorb_shifts import Absorber
from fpcompiler.passes.base import Pass, PassContext, add_note, has_no_uses, pass_text
from fpcompiler.passes.candidates import CHOICES, check_choice, for_input
from fpcompiler.passes.shift_channels import (
    Shift,
    block_of,
    divide_weights,
    limit_for,
    lowering_for,
    quantize_input,
    shift_input,
)
from fpcompiler.passes.shift_proof import Proof
from fpcompiler.passes.weights import OpenWeights, kind_of

_LOWERINGS: Final = ("auto", "permute", "container", "smooth")
_RHOS: Final = ("max", "search")
_LARGEST_LIMIT: Final = 31
_FP16_LIMIT: Final = 15
"""The largest exponent of a power of two in fp16."""


@dataclass(frozen=True)
class Preshift(Pass):
    """Give the channels of an input biases of their own (LLM-FP4, arXiv 2310.16836, section 4.2).

    Channel ``j`` is multiplied by ``2**k_j`` before it is quantized, and column ``j`` of the
    weights divided by it, so that one scale for the tensor or token fits all channels. Layers that
    share an input share ``k``. Inputs with scales of blocks have no need of it and are left.

    Attributes:
        lowering: What becomes of the weights. ``permute`` brings channels of equal ``k`` into
            blocks, whose scales take ``2**-k``: formats stay, the input is permuted at each call.
            ``container`` rounds the weights as they are and holds ``2**-k`` in codes of a wider
            format. ``smooth`` rounds the divided weights, which is not what the paper computes, but
            needs neither. ``auto`` is ``permute`` for weights with block scales, else
            ``container``.
        absorb: Whether norm weights, biases and rows of weights before take ``2**k``; where they
            cannot, and without this, a multiplication is added.
        rho: How ranges are chosen. ``max``: that of a channel is its largest magnitude, and that of
            a tensor the largest of all, or what a static scale says. ``search`` finds those with
            the least error of the layers' outputs, no shift among them, and a static scale where
            an input has one for the tensor.
        formats: What ``rho=search`` may choose the input's format among: only the ``given`` one, or
            those of the ``same-bits``, which have other ranges of ``k_j``.
        rounding: How ``k_j`` is rounded: ``floor``, ``round`` or ``code``, see
            :class:`fpcompiler.numerics.preshift.ShiftRounding`.
        limit: The largest ``k_j``, less where no wider format would hold the weights; 0:
            ``2**e - 1`` for the exponent bits of the input's format, as in the paper.
        max_buckets: How many different ``k_j`` ``permute`` keeps.
        max_padding: How many zeros ``permute`` may add, relative to the number of channels; it
            keeps fewer different ``k_j`` where there would be more.
        target: Name of the target, which must be able to run the format.
    """

    name: ClassVar[str] = "preshift"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    lowering: str = "auto"
    absorb: bool = True
    rho: str = "max"
    formats: str = "given"
    rounding: str = "floor"
    limit: int = 0
    max_buckets: int = 4
    max_padding: float = 0.25
    target: str = "reference"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If there is no such lowering or rounding, or a number is out of range.
        """
        roundings = [rounding.value for rounding in ShiftRounding]
        known = {"lowering": _LOWERINGS, "rho": _RHOS, "formats": CHOICES, "rounding": roundings}
        for option, values in known.items():
            check_choice(self.name, option, getattr(self, option), values)
        if not 0 <= self.limit <= _LARGEST_LIMIT or self.max_buckets < 1 or self.max_padding < 0:
            raise PassError(
                f"{self.name}: limit must be 0 to 31, max_buckets at least 1 and max_padding at "
                "least 0."
            )

    def run(self, program: Program, context: PassContext) -> None:
        """Shift every input that it can help, and prove that nothing else has changed.

        Raises:
            PassError: If there is no calibration data, weights cannot be divided in the way that is
                wanted, or the proof fails; the layer is named.
            NumericsError: If an input holds NaN or infinity.
        """
        calibration = context.calibrated(self.name)
        every = self._shifts(program, calibration, context)
        shifts = [shift for shift in every if shift.largest]
        for shift in every:
            if not shift.largest and shift.scale is not None:
                quantize_input(program, shift)
                _describe_scale(shift)
        if not shifts:
            return
        proof = Proof(program, calibration, shifts)
        absorber = Absorber(program) if self.absorb else None
        places = []
        for shift in shifts:
            divide_weights(program, shift)
            places.append(shift_input(program, shift, absorber))
        text = proof.check()
        for shift, place in zip(shifts, places, strict=True):
            quantize_input(program, shift)
            _describe(shift, place, text)
            _count(shift, place, context)
        for op in reversed(program.operations("fpq.fold", "fpq.quantize", "fpq.encode")):
            if has_no_uses(op):
                op.erase()

    def _shifts(
        self, program: Program, calibration: Calibration, context: PassContext
    ) -> list[Shift]:
        every = input_groups(program)
        weights = OpenWeights(program, every)
        groups = []
        for group in every:
            reason = _unfit(group, weights)
            if reason:
                context.count(f"inputs left: {reason}")
            else:
                groups.append(group)
        work = partial(self._biases, program, weights)
        found = calibration.visit(
            program, groups, work, label=pass_text(self), progress=context.progress
        )
        shifts = []
        for group in groups:
            shift = self._shift(group, found[group.name])
            if shift.largest or shift.scale is not None:
                shifts.append(shift)
            if shift.largest:
                continue
            if int(found[group.name]["exponents"].max()):
                context.count("inputs left: more zeros than max_padding")
            else:
                context.count("inputs left: a shift does not help")
        return shifts

    def _biases(
        self, program: Program, weights: OpenWeights, group: Group, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        """Return ``k_j``, and the scale of the tensor where it was searched."""
        assert group.quantize is not None
        operand = kind_of(group.quantize).operand
        limit = self._limit(group)
        rounding = ShiftRounding(self.rounding)
        own = weights.of(group) if self.rho == "search" else []
        if not own:
            gamma = _gamma(program, group.quantize, statistics.amax)
            shift = preshift.preshift(
                statistics.amax, operand.format, gamma=gamma, rounding=rounding, limit=limit,
                layer=group.name,
            )  # fmt: skip
            return {"exponents": shift.exponents}
        sample = statistics.sample.float()
        rounded = [weights.rounded(weight).to(sample.device) for weight in own]
        ranges = channel_ranges(statistics.amax, statistics.gram, statistics.tokens)
        if not _is_static(operand):
            found = search_powers(
                sample, rounded, operand, ranges=ranges, limit=limit, layer=group.name
            )
            return {"exponents": found}
        shift = search_rho(
            sample, rounded, self._formats(group), ranges=ranges, rounding=rounding, limit=limit,
            layer=group.name,
        )  # fmt: skip
        scale, name = torch.tensor([shift.scale]), torch.tensor(list(shift.format.name.encode()))
        return {"exponents": shift.exponents, "scale": scale, "format": name.to(torch.uint8)}

    def _limit(self, group: Group) -> int:
        """Return the largest exponent that the type of the input and the weights allow."""
        assert group.quantize is not None
        most = self.limit or preshift.paper_limit(kind_of(group.quantize).operand.format)
        kind = tensor_type(group.x)
        if kind is not None and kind.element == "f16":
            most = min(most, _FP16_LIMIT)
        return limit_for(group, lowering_for(group, self.lowering), most)

    def _formats(self, group: Group) -> list[FloatSpec]:
        assert group.quantize is not None
        operands = [kind_of(op.operands[1].owner.operation).operand for op in group.layers]
        given = kind_of(group.quantize).operand
        own = for_input(targets.lookup(self.target), operands, given, self.formats)
        return [operand.format for operand in own]

    def _shift(self, group: Group, found: Mapping[str, Tensor]) -> Shift:
        lowering = lowering_for(group, self.lowering)
        exponents, scale = found["exponents"].cpu(), found.get("scale")
        name = found.get("format")
        format = None if name is None else parse_format(bytes(name.tolist()).decode())
        if lowering != "permute" or not int(exponents.max()):
            return Shift(group, exponents, lowering, scale=scale, format=format)
        buckets = self._buckets(exponents, block_of(group))
        return Shift(group, buckets.exponents, lowering, buckets, scale, format)

    def _buckets(self, exponents: Tensor, block: int) -> Buckets:
        """Return as many buckets as the zeros that they cost allow."""
        most = (1 + self.max_padding) * max(len(exponents), 1)
        for count in range(self.max_buckets, 1, -1):
            buckets = bucket_permutation(exponents, group=block, max_buckets=count)
            if len(buckets.order) <= most:
                return buckets
        return bucket_permutation(exponents, group=block, max_buckets=1)


def _unfit(group: Group, weights: OpenWeights) -> str:
    """Return why the input of a group is left as it is, or an empty text."""
    if group.quantize is None:
        return "not quantized"
    if kind_of(group.quantize).operand.block is not None:
        return "scales of blocks"
    if not all(weights.is_open(linear.operands[1]) for linear in group.layers):
        return "weights stored or computed"
    scaled = all(kind_of(op.operands[1].owner.operation).operand.levels for op in group.layers)
    return "" if scaled else "weights without scales"


def _is_static(operand: Operand) -> bool:
    """Return whether one scale holds for the tensor, so that it can be found in calibration."""
    kinds = [level.granularity for level in operand.levels]
    return kinds == [Granularity.TENSOR]


def _gamma(program: Program, quantize: ir.Operation, amax: Tensor) -> float:
    """Return the part of the range that a static scale keeps; 1 where there is none."""
    operand = kind_of(quantize).operand
    largest = float(amax.max())
    if quantize.name != "fpq.encode" or not _is_static(operand) or not largest:
        return 1.0
    return float(given_scales(program, quantize)[0]) * operand.format.max / largest


def _describe(shift: Shift, place: str, proof: str) -> None:
    """Say at each layer what was done, for dumps and the plan."""
    where = f"in {place}" if place else "by a multiplication"
    note = f"input times 2**k, k to {shift.largest}, {where}; {shift.describe()}"
    for linear in shift.group.layers:
        add_note(linear, note)
        linear.attributes["fpq.proof"] = ir.StringAttr.get(proof)


def _describe_scale(shift: Shift) -> None:
    for linear in shift.group.layers:
        add_note(linear, "static scale of the input searched; no shift helps")


def _count(shift: Shift, place: str, context: PassContext) -> None:
    context.count("layers shifted", len(shift.group.layers))
    context.count("inputs shifted")
    context.count("inputs absorbed", int(bool(place)))
    context.count("multiplications added", int(not place))
    largest = context.statistics["largest k"]
    context.count("largest k", max(shift.largest - largest, 0))
    if shift.buckets is not None:
        context.count("zeros added", len(shift.buckets.order) - shift.group.k)
