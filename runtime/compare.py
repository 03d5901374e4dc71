"""Compares a compiled model with the eager one, layer by layer and output by output."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from fpcompiler.errors import OptionError, RunError
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import fused
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.operators import QUANTIZERS
from fpcompiler.runtime.ops import LinearArguments
from fpcompiler.runtime.tables import CompareRow, CompareTable, PlanTable
from fpcompiler.tree import Spec, describe, leaf_paths

Batch: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"
"""The arguments of one call: one tensor, positional arguments, or keyword arguments."""

_PIECE: Final = 1 << 20
_MAIN: Final = frozenset(
    ["fpc.linear"]
    + [f"aten.{name}.default" for name in ("linear", "addmm", "mm", "bmm", "matmul", "baddbmm")]
    + [f"aten.{name}.default" for name in ("convolution", "conv1d", "conv2d", "conv3d")]
    + ["aten.embedding.default"]
)
"""The operators of which each call of a layer has exactly one."""


@dataclass
class Distance:
    """Sums over pairs of tensors, from which the measures follow; all in fp64.

    Ratios of sums, not means of ratios: a batch with little signal does not weigh as much as
    another one.
    """

    signal: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    product: float = 0.0
    worst: float = 0.0
    pairs: int = 0

    def add(self, reference: Tensor, value: Tensor) -> None:
        """Add a pair of tensors of the same shape."""
        a, b = (_real(tensor).reshape(-1) for tensor in (reference, value.to(reference.device)))
        for piece, other in zip(torch.split(a, _PIECE), torch.split(b, _PIECE), strict=True):
            self._add(piece.to(torch.float64), other.to(torch.float64))
        self.pairs += 1

    def _add(self, a: Tensor, b: Tensor) -> None:
        # Equal infinities (masked scores) are no difference, and are no part of the sums.
        same = (a == b) & a.isinf()
        a, b = a.masked_fill(same, 0.0), b.masked_fill(same, 0.0)
        error = a - b
        self.signal += float(a.square().sum())
        self.energy += float(b.square().sum())
        self.noise += float(error.square().sum())
        self.product += float(a @ b)
        worst = float(error.abs().max()) if error.numel() else 0.0
        self.worst = worst if math.isnan(worst) else max(self.worst, worst)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio; infinite if nothing differs, NaN if NaN came in."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0:
            return -math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan

    @property
    def cosine(self) -> float:
        """Cosine of the angle; 1 if both are zero throughout, 0 if only one is."""
        if self.signal == 0.0 or self.energy == 0.0:
            return float(self.signal == self.energy)
        return self.product / math.sqrt(self.signal) / math.sqrt(self.energy)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


class _Rows:
    """The rows of the table while the batches run."""

    def __init__(self, names: Iterable[str], kind: str) -> None:
        self.kind = kind
        self.distances = {name: Distance() for name in names}
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reference: object, value: object) -> None:
        if not isinstance(reference, Tensor) or not isinstance(value, Tensor):
            self.reasons.setdefault(name, f"the model gives {describe(reference)}")
            return
        folded = value.numel() == reference.numel() and value.shape[-1:] == reference.shape[-1:]
        if value.shape != reference.shape and not folded:
            shapes = f"{list(reference.shape)}, compiled {list(value.shape)}"
            self.reasons.setdefault(name, f"shapes differ: {shapes}")
            return
        self.distances[name].add(reference, value)

    def finish(self) -> list[CompareRow]:
        return [self._row(name, distance) for name, distance in self.distances.items()]

    def _row(self, name: str, d: Distance) -> CompareRow:
        reason = self.reasons.get(name, "" if d.pairs else "it was not called")
        if reason:
            return CompareRow(name, self.kind, None, None, None, 0, reason)
        return CompareRow(name, self.kind, d.sqnr_db, d.cosine, d.worst, d.pairs)


def compare(executor: Executor, model: nn.Module, batches: Iterable[Batch]) -> CompareTable:
    """Run both models on every batch and compare what their layers and they give.

    A layer that computes its activation too is compared behind that.

    Args:
        executor: The compiled model; it runs from its initial state, with a state of its own.
        model: The eager model; it runs in evaluation mode, and gets back its mode afterwards.
        batches: The calls.

    Raises:
        OptionError: If there are no batches, or one is of another type.
        RunError: If a batch does not fit the compiled model, or the results are nested otherwise.
    """
    plan = executor.plan
    executor = executor.fresh()
    layers = _Rows((row.name for row in PlanTable.of(plan.layers, "").rows), "layer")
    results = _result_values(plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in layers.distances:
        if name not in modules:
            layers.reasons[name] = "the model has no module of that name"
        elif not results.get(name):
            layers.reasons[name] = "no step of the compiled program computes it alone"
    outputs = _Rows(_output_names(plan.signature.outputs), "output")
    hooked = {name: modules[name] for name in layers.distances if name not in layers.reasons}
    count = 0
    for batch in batches:
        args, kwargs = call_arguments(batch)
        expected, recorded = _run_eager(model, hooked, args, {**plan.signature.fixed, **kwargs})
        _refuse_uneven(layers, recorded, results)
        observer = _observer(layers, recorded, results)
        actual = executor.observed(observer, *args, **kwargs)
        spec = plan.signature.outputs
        pairs = zip(_leaves(spec, expected), _leaves(spec, actual), strict=True)
        for name, (reference, value) in zip(outputs.distances, pairs, strict=True):
            outputs.add(name, reference, value)
        count += 1
    if not count:
        raise OptionError("compare() got no batches; pass a list of inputs, such as [x].")
    return CompareTable(tuple(layers.finish() + outputs.finish()))


def call_arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that a batch stands for.

    Raises:
        OptionError: If it is of another type.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise OptionError(
        f"a batch is a tensor, a tuple of arguments or a dict of keyword arguments, not "
        f"{describe(batch)}."
    )


def _output_names(spec: Spec) -> list[str]:
    return [path or "output" for path in leaf_paths(spec)]


def _result_values(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return, per layer, the values that are its results, one per call, in call order.

    A call is one main operator; what follows at once in the same layer (a reshape, a bias) belongs
    to it. A layer without one (a convolution as a GEMM is several operators) is marked where its
    result is.
    """
    results: dict[str, list[str]] = defaultdict(list)
    marked: dict[str, list[str]] = defaultdict(list)
    layer = ""
    for step in plan.steps:
        if step.layer and step.op not in QUANTIZERS:
            marked[step.layer].append(step.outs[0])
        main = step.op in _MAIN
        if main and step.layer:
            layer = step.layer
            results[layer].append(step.outs[0])
        elif layer and step.layer == layer and _continues(step, results[layer][-1]):
            results[layer][-1] = step.outs[0]
        else:
            layer = ""
    return {name: tuple(results.get(name, values)) for name, values in marked.items()}


def _continues(step: Step, value: str) -> bool:
    return step.op not in QUANTIZERS and len(step.outs) == 1 and value in step.uses()


def _run_eager(
    model: nn.Module,
    hooked: Mapping[str, nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, deque[Any]]]:
    recorded: dict[str, deque[Any]] = {name: deque() for name in hooked}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluation(model))
        for name, module in hooked.items():
            handle = module.register_forward_hook(_recorder(recorded[name]))
            stack.callback(handle.remove)
        return model(*args, **kwargs), recorded


def _recorder(calls: deque[Any]) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, _args: Any, result: Any) -> None:
        # A copy, because the next module may work in place.
        calls.append(result.detach().clone() if isinstance(result, Tensor) else result)

    return record


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _refuse_uneven(
    layers: _Rows,
    recorded: Mapping[str, Sequence[Any]],
    results: Mapping[str, Sequence[str]],
) -> None:
    for name, calls in recorded.items():
        if len(calls) != len(results[name]):
            layers.reasons.setdefault(
                name, f"called {len(calls)} times in the model, {len(results[name])} compiled"
            )


def _observer(
    layers: _Rows, recorded: Mapping[str, deque[Any]], results: Mapping[str, Sequence[str]]
) -> Callable[[Step, Tensor], None]:
    owners = {
        value: name
        for name, values in results.items()
        if name in recorded and name not in layers.reasons
        for value in values
    }

    def observe(step: Step, value: Tensor) -> None:
        name = owners.get(step.outs[0])
        if name is not None:
            layers.add(name, _activated(recorded[name].popleft(), step), value)

    return observe


def _activated(result: object, step: Step) -> object:
    """Return a layer's result in the model as the step computes it: a layer may have two in one."""
    if step.op != "fpc.linear" or not isinstance(result, Tensor):
        return result
    given = dict(zip(LinearArguments._fields, step.args, strict=False)) | dict(step.kwargs)
    return fused.activate(result, given.get("activation", ""))


def _leaves(spec: Spec, value: Any) -> list[Any]:
    """Return the parts of a result that a spec names; more entries than it names are allowed."""
    if spec["t"] == "leaf":
        return [value]
    children = spec.get("c", ())
    keys = spec.get("k", range(len(children)))
    try:
        parts = [value[key] for key in keys]
    except (KeyError, IndexError, TypeError) as error:
        raise RunError(
            f"The model's result is {describe(value)}, which does not have the entries "
            f"{list(keys)} of the compiled one. Pass the model that was compiled."
        ) from error
    return [
        leaf for child, part in zip(children, parts, strict=True) for leaf in _leaves(child, part)
    ]
