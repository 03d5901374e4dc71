"""The kernels of an artifact on a GPU: loading them, and the steps of a plan that they run.

A layer without kernels runs as on any device, by the reference; so does everything in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.artifact.container import Buffer
from fpcompiler.artifact.kernels import Instance, KernelIndex, TargetKernels
from fpcompiler.errors import ArtifactError, describe_layer
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.cuda.attention import (
    ATTENTION,
    NO_ATTENTION,
    OPERATOR,
    AttendKernels,
    CudaAttention,
)
from fpcompiler.runtime.cuda.cached import caches_of, functions_of
from fpcompiler.runtime.cuda.checks import Check
from fpcompiler.runtime.cuda.codes import CudaCodes, kind_of
from fpcompiler.runtime.cuda.flags import Flags
from fpcompiler.runtime.cuda.form import InputKind
from fpcompiler.runtime.cuda.joined import CudaPart, CudaValues, join, joinable, parts_of
from fpcompiler.runtime.cuda.layers import (
    CudaLayer,
    CudaLinear,
    Gemm,
    Machine,
    QuantizingLayer,
    input_kind,
)
from fpcompiler.runtime.cuda.operators import load_operators, open_library
from fpcompiler.runtime.cuda.pairs import output_pairs, quantizing_of
from fpcompiler.runtime.cuda.quantizers import CudaQuantizer, PassOn, QuantizeKernels
from fpcompiler.runtime.cuda.select import capability_of, select
from fpcompiler.runtime.layer_steps import (
    LayerArguments,
    read_layer,
    shared_quantizers,
    shared_values,
    weight_names,
)
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.ops import LinearArguments
from fpcompiler.runtime.trust import Gatekeeper

OPERATORS: Final = "operators"
"""The role of the library of operators."""

_RESIDUAL: Final = LinearArguments._fields.index("residual")


class Bound(NamedTuple):
    """A plan whose layers run on kernels.

    Attributes:
        functions: What runs each step.
        single: The same where every step gives what the plan says, for whoever looks at results.
        flags: What quantizers set.
        check: Raises if a quantizer met NaN or infinity.
    """

    functions: list[Function]
    single: list[Function]
    flags: Flags
    check: Check


@dataclass(frozen=True, eq=False)
class CudaKernels:
    """The kernels for one GPU, loaded.

    Attributes:
        target: What the artifact has for it.
        gemms: The GEMMs by the name of their instance.
        quantizers: The kernels that quantize.
        machine: The GPU.
        attention: The kernels of attention.
    """

    target: TargetKernels
    gemms: Mapping[str, Gemm]
    quantizers: QuantizeKernels
    machine: Machine
    attention: AttendKernels = NO_ATTENTION

    def runs(self, step: Step) -> bool:
        """Return whether a step is a layer that has kernels."""
        row = self.target.layers.get(step.layer) if step.op == "fpc.linear" else None
        return row is not None and bool(row.kernels)

    def own_constants(self, plan: Plan) -> frozenset[str]:
        """Return the constants that are read by layers with kernels only.

        The kernels have copies of them in an order of their own, so they need not be on the GPU.
        """
        own = {name for step in plan.steps if self.runs(step) for name in weight_names(step)}
        others = {name for step in plan.steps if not self.runs(step) for name in step.uses()}
        outside = {out for out in plan.outputs if isinstance(out, str)}
        return frozenset((own & {*plan.constants}) - others - outside)

    def bind(
        self, plan: Plan, functions: Sequence[Function], constants: Mapping[str, Tensor]
    ) -> Bound:
        """Return what runs each step, and the check of its quantizers.

        Args:
            plan: The plan.
            functions: What runs each step otherwise.
            constants: The constants of the plan by value name, on any device.

        Raises:
            ArtifactError: If the kernels of a layer do not compute it.
        """
        result = list(functions)
        for index, function in self._attention(plan, functions).items():
            result[index] = function
        layers = self._layers(plan, constants)
        kernels = {index: self._kernels_of(plan.steps[index]) for index in layers}
        kinds = {i: input_kind(kernels[i], layer.x_operand, layer.k) for i, layer in layers.items()}
        found = shared_quantizers(plan, kinds)
        plain = shared_values(plan, kinds)
        groups = joinable(plan, {**found, **plain}, layers, kernels)
        runs = self._run_layers(plan, layers, kernels, {group[0]: group for group in groups})
        _settle(self.machine.device)
        codes = self._code_kinds(plan, found)
        flags = Flags(len(found) + len(codes), self.machine.device)
        for index, function in runs.items():
            result[index] = function
        for index, reader in plain.items():
            result[index] = CudaValues(result[index], runs[reader].linear)
        for place, (index, reader) in enumerate(found.items()):
            step, linear = plan.steps[index], runs[reader].linear
            result[index] = CudaQuantizer.of(linear, self.quantizers, step, flags, place)
        for place, (index, kind) in enumerate(codes.items(), len(found)):
            result[index] = CudaCodes.of(kind, self.quantizers, functions[index], flags, place)
        check = Check.of([plan.steps[i] for i in (*found, *codes)])
        return Bound(_paired(plan, result, found), result, flags, check)

    def _code_kinds(self, plan: Plan, others: Mapping[int, int]) -> dict[int, InputKind]:
        """Return what quantizers make whose codes something else reads, where kernels do."""
        kinds = {i: kind_of(step) for i, step in enumerate(plan.steps) if i not in others}
        return {i: kind for i, kind in kinds.items() if kind and self.quantizers.by_types(kind)}

    def _attention(self, plan: Plan, functions: Sequence[Function]) -> dict[int, Function]:
        """Return what runs attention, and the steps in front of it that unpack its caches."""
        if not self.attention.places:
            return {}
        steps = [index for index, step in enumerate(plan.steps) if step.op == OPERATOR]
        sms = self.machine.sms
        found: dict[int, Function] = {
            index: CudaAttention(self.attention, sms, functions[index]) for index in steps
        }
        if self.attention.reads_caches:
            for pair in caches_of(plan).values():
                for cache in pair:
                    found.update(functions_of(cache))
        return found

    def _layers(self, plan: Plan, constants: Mapping[str, Tensor]) -> dict[int, LayerArguments]:
        """Return the layers that have kernels, by the index of their step."""
        found = {}
        for index, step in enumerate(plan.steps):
            if not self.runs(step):
                continue
            layer = read_layer(step, constants)
            if isinstance(layer, str):
                raise ArtifactError(
                    f"{describe_layer(step.layer)} has kernels in the artifact, but {layer}. "
                    "Compile the model again."
                )
            found[index] = layer
        return found

    def _kernels_of(self, step: Step) -> dict[str, Gemm]:
        names = self.target.layers[step.layer].kernels
        return {use: self.gemms[name] for use, name in names.items() if name in self.gemms}

    def _run_layers(
        self,
        plan: Plan,
        layers: Mapping[int, LayerArguments],
        kernels: Mapping[int, Mapping[str, Gemm]],
        groups: Mapping[int, tuple[int, ...]],
    ) -> dict[int, CudaLayer | CudaPart]:
        """Return what runs each layer; steps with the same weights share them."""
        made: dict[tuple[str, ...], CudaLinear] = {}
        result: dict[int, CudaLayer | CudaPart] = {}
        for index in layers:
            if index in result:
                continue
            group = groups.get(index, (index,))
            own = [layers[i] for i in group]
            key = tuple(text for i in group for text in _identity(plan.steps[i]))
            if key not in made:
                layer = join(own)
                made[key] = CudaLinear(
                    kernels[index], self.machine, layer.w, layer.bias, layer.x_operand, *layer[3:]
                )
            parts = parts_of(made[key], index, own)
            result.update(zip(group, parts, strict=True))
        return result


def _identity(step: Step) -> tuple[str, ...]:
    """Return what layers that are the same agree in."""
    return (*weight_names(step), *map(str, step.args[3:_RESIDUAL]))


def _paired(plan: Plan, functions: Sequence[Function], found: Mapping[int, int]) -> list[Function]:
    """Return the functions with layers that quantize their output where kernels do both."""
    result = list(functions)
    for index, quantizer in output_pairs(plan, found).items():
        made, function = quantizing_of(plan.steps[quantizer]), functions[quantizer]
        layer = functions[index]
        if made is None or not isinstance(layer, CudaLayer):
            continue
        assert isinstance(function, CudaQuantizer)
        kind = function.linear.kind
        if layer.linear.quantizes(kind, made):
            result[index] = QuantizingLayer(layer, kind, function.flags, function.place)
            result[quantizer] = PassOn(function.scales)
    return result


def load_kernels(
    files: Mapping[str, Buffer],
    device: torch.device,
    gatekeeper: Gatekeeper,
    attention: bool = True,
) -> CudaKernels | None:
    """Load the kernels of an artifact for a GPU.

    Args:
        files: The files of kernels in the artifact, by name.
        device: A CUDA device.
        gatekeeper: Decides which libraries are loaded as they are.
        attention: Whether kernels of attention are used.

    Returns:
        None if the artifact holds no kernels at all.

    Raises:
        TargetError: If it holds kernels, but none for this GPU.
        ArtifactError: If a library is not trusted and cannot be built again, or does not load.
        OptionError: If libraries cannot be kept where nobody else writes.
    """
    index = KernelIndex.of(files)
    if not index.targets:
        return None
    target = select(index, capability_of(device))
    return open_target(target, files, Machine.of(device), gatekeeper, attention)


def open_target(
    target: TargetKernels,
    files: Mapping[str, Buffer],
    machine: Machine,
    gatekeeper: Gatekeeper,
    attention: bool = True,
) -> CudaKernels:
    """Load the kernels of one target: the operators first, then what its layers use.

    Raises:
        ArtifactError: As :func:`load_kernels`.
        OptionError: As :func:`load_kernels`.
    """

    def admit(instance: Instance) -> Path:
        return gatekeeper.admit(instance, bytes(files[instance.files["library"]]))

    used = {name for row in target.layers.values() for name in row.kernels.values()}
    by_role: dict[str, list[Instance]] = {}
    for name, instance in target.instances.items():
        always = (OPERATORS, "quantize", *((ATTENTION,) if attention else ()))
        if name in used or instance.role in always:
            by_role.setdefault(instance.role, []).append(instance)
    if OPERATORS not in by_role:
        raise ArtifactError(
            f"the kernels for {target.target} come without the operators that run them; compile "
            "the model again."
        )
    load_operators(admit(by_role[OPERATORS][0]))
    gemms = {i.name: Gemm.of(i, open_library(admit(i))) for i in by_role.get("gemm", [])}
    quantizers = QuantizeKernels.of([admit(i) for i in by_role.get("quantize", [])])
    attend = AttendKernels.of([admit(i) for i in by_role.get(ATTENTION, [])])
    return CudaKernels(target, gemms, quantizers, machine, attend)


def _settle(device: torch.device) -> None:
    """Wait until weights are where kernels read them.

    Kernels load weights before they wait for the work in front of them (programmatic dependent
    launch), and calls may be on another stream than the one on which weights were packed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
