"""Runs a plan: an interpreter over its steps. No code is generated or evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fpcompiler.artifact.container import ALIGNMENT
from fpcompiler.errors import ArtifactError, FpcompilerError
from fpcompiler.native import library
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import backends, inputs, operators
from fpcompiler.runtime.compiled_rest import Run, compile_rest
from fpcompiler.runtime.cuda.graphs import GraphCache
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.devices import parse_device
from fpcompiler.runtime.instructions import STEP_ERRORS, Instruction, last_uses, step_error
from fpcompiler.runtime.ops import LINEAR_STEP, without_residual
from fpcompiler.runtime.program import Program, ProgramCache
from fpcompiler.runtime.state import Initial, in_place_updates, write_rows
from fpcompiler.tree import unflatten

Observer: TypeAlias = Callable[[Step, Tensor], None]
"""Called after each step that belongs to a layer and has one tensor as its result."""

Caller: TypeAlias = Callable[[Step, operators.Function, list[Any], dict[str, Any]], Any]
"""Called in place of the function of each step, with its arguments; returns its result."""


class Executor:
    """A plan and its tensors on a device.

    Args:
        plan: The program.
        tensors: The tensors that the plan names. Constants are used where they are if they are
            on the device already; nothing writes to them.
        device: Where to run.
        release: Gives back the memory of tensors that have been copied, if they can be read again.
        kernels: The compiled kernels for the device, if there are any.
        graphs: Records calls on a GPU and replays them; None runs all step by step.
        same_everywhere: Whether operators of torch have the same result on every machine.

    Raises:
        ArtifactError: If the plan uses an operator or a kernel that is unknown or refused, or a
            tensor that does not exist.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        device: str | torch.device = "cpu",
        release: Callable[[], None] | None = None,
        kernels: CudaKernels | None = None,
        graphs: GraphCache | None = None,
        same_everywhere: bool = False,
    ) -> None:
        self.plan = plan
        self._same_everywhere = same_everywhere
        self.device = parse_device(device)
        stay = kernels.own_constants(plan) if kernels else frozenset()
        self._constants = {
            name: _aligned(_tensor(tensors, key).to("cpu" if name in stay else self.device))
            for name, key in plan.constants.items()
        }
        self._initial = {
            name: Initial(_tensor(tensors, key), self.device) for name, key in plan.state.items()
        }
        self._state = {name: initial.new() for name, initial in self._initial.items()}
        here = {name: t for name, t in self._constants.items() if name not in stay}
        functions = single = backends.bind_plan(plan, here, release, same_everywhere)
        self._kernels = kernels.bind(plan, functions, self._constants) if kernels else None
        if self._kernels:
            functions, single = self._kernels.functions, self._kernels.single
            if release is not None:
                release()
        self._code = _assemble(plan, functions, self.device)
        # Layers that quantize their output do not show it.
        self._single = _assemble(plan, single, self.device) if single != functions else self._code
        self._names = inputs.leaf_names(plan.signature)
        self._shared = _shared_values(plan, self._code)
        # What its steps have written to the state itself need not be copied there.
        in_place = {item.outs[0] for item in self._code if item.function is write_rows}
        self._stores = tuple(store for store in plan.stores if store[0] not in in_place)
        self._programs = self._new_programs()
        self.graphs = graphs
        self._compiled: Run | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the arguments of the model's ``forward``.

        Raises:
            RunError: If the arguments do not fit, or a step fails.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        run = self.observed
        if self._same_everywhere and torch.compiler.is_compiling():
            # What torch.compile joins is rounded less often.
            run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
        return run(None, *args, **kwargs)

    def observed(self, observe: Observer | None, *args: Any, **kwargs: Any) -> Any:
        """Run, and show the result of each step that belongs to a layer to ``observe``.

        A layer's residual is added behind that, in an operation of its own.

        Raises:
            RunError: If the arguments do not fit, or a step fails.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        leaves = inputs.bind(self.plan.signature, args, kwargs)
        outputs = self.run_leaves(leaves, observe)
        return unflatten(self.plan.signature.outputs, outputs)

    def run_leaves(
        self,
        leaves: Sequence[Tensor],
        observe: Observer | None = None,
        caller: Caller | None = None,
        times: list[tuple[int, int]] | None = None,
    ) -> list[Any]:
        """Run on tensors, one per placeholder; return one value per leaf of the outputs.

        Args:
            leaves: The tensors.
            observe: Sees the results of the steps.
            caller: Runs the steps.
            times: If :meth:`program` runs, gets what it takes: an index into the plan's steps and
                nanoseconds, for each native operation and each step of torch. An empty list.

        Raises:
            RunError: If the tensors do not fit, or a step fails.
            NumericsError: If a value to quantize is NaN or infinite.
        """
        inputs.check(self.plan, self._names, leaves, self.device)
        with torch.no_grad():
            special = observe is not None or caller is not None or torch.compiler.is_compiling()
            if special or (times is not None and self.graphs is None):
                return self._finish(self._results(leaves, observe, caller, times))
            run = self._results if self._compiled is None else self._compiled
            if self.graphs is None:
                return self._finish(run(leaves))
            return self.graphs.run(leaves, run, self._finish, self._results)

    def compile_rest(self) -> None:
        """Let torch.compile compile what lies between quantized layers, from the next call on.

        Calls that are observed or timed run the steps as before.
        """
        self._compiled = compile_rest(self._results, self.device)

    def _results(
        self,
        leaves: Sequence[Tensor],
        observe: Observer | None = None,
        caller: Caller | None = None,
        times: list[tuple[int, int]] | None = None,
    ) -> list[Any]:
        """Return the outputs, behind them what is stored, and with kernels what they have flagged.

        A second run with the same leaves, before anything is stored, gives the same.
        """
        values = dict(self._constants)
        values.update(self._state)
        for placeholder, leaf in zip(self.plan.placeholders, leaves, strict=True):
            values[placeholder.name] = leaf
        if self._programs is None or observe or caller or torch.compiler.is_compiling():
            self._run_steps(values, observe, caller)
        else:
            self._programs.run(values, times)
        kept = *self.plan.outputs, *(value for value, _ in self._stores)
        results = [self._own(name, values) for name in kept]
        return [*results, self._kernels.flags.whole()] if self._kernels else results

    def _finish(self, results: list[Any]) -> list[Any]:
        """Check what quantizers met, store the new state, and return the outputs."""
        if self._kernels:
            # With a star torch.compile of torch 2.11 would make a tuple of the others.
            results = self._checked(results[:-1], results[-1])
        count = len(self.plan.outputs)
        for (_, name), update in zip(self._stores, results[count:], strict=True):
            self._state[name].copy_(update)
        return results[:count]

    def _checked(self, results: list[Any], flags: Tensor | None) -> list[Any]:
        assert self._kernels is not None
        check, traced = self._kernels.check, self._kernels.flags
        if not torch.compiler.is_compiling():
            check(traced.traced if flags is None else flags)
            return results
        if not check.layers:
            return results
        first = next((i for i, x in enumerate(results) if isinstance(x, Tensor)), None)
        if first is not None:
            results[first] = check.traced(results[first], traced)
        return results

    def program(self, leaves: Sequence[Tensor]) -> Program | None:
        """Return what runs in place of the steps for tensors of these sizes, if there is one now.

        There is none before the third call with them.
        """
        return None if self._programs is None else self._programs.find(leaves)

    def fresh(self) -> Executor:
        """Return an executor of the same program that has a state of its own, the initial one."""
        other = copy.copy(self)
        other._state = {name: initial.new() for name, initial in self._initial.items()}
        other._programs = other._new_programs()
        other.graphs = None if self.graphs is None else self.graphs.fresh()
        other._compiled = None
        return other

    def reset(self) -> None:
        """Bring the state (KV caches) back to what the artifact holds."""
        for name, initial in self._initial.items():
            initial.restore(self._state[name])

    def _new_programs(self) -> ProgramCache | None:
        native = library() if self.device.type == "cpu" else None
        if (
            native is None
            or self._kernels
            or self._same_everywhere
            or not any(step.kernel == "cpu" for step in self.plan.steps)
        ):
            return None
        outputs = (out for out in self.plan.outputs if isinstance(out, str))
        return ProgramCache(
            self._code,
            {**self._constants, **self._state},
            (placeholder.name for placeholder in self.plan.placeholders),
            (*outputs, *(value for value, _ in self._stores)),
            native,
            self._run_steps,
        )

    def _run_steps(
        self,
        values: dict[str, Any],
        observe: Observer | None = None,
        caller: Caller | None = None,
    ) -> None:
        index = 0
        looks = observe or caller or torch.compiler.is_compiling()
        try:
            for index, instruction in enumerate(self._single if looks else self._code):  # noqa: B007  (read in the handler)
                args = operators.fill(instruction.args, values)
                kwargs = {k: operators.fill(v, values) for k, v in instruction.kwargs.items()}
                residual = None
                if observe is not None and instruction.step.op == LINEAR_STEP:
                    args, residual = without_residual(args)
                if caller is None:
                    result = instruction.function(*args, **kwargs)
                else:
                    result = caller(instruction.step, instruction.function, args, kwargs)
                if observe is not None and instruction.step.layer and isinstance(result, Tensor):
                    observe(instruction.step, result)
                if instruction.spread:
                    values.update(zip(instruction.outs, result, strict=True))
                else:
                    values[instruction.outs[0]] = result if residual is None else result + residual
                for name in instruction.frees:
                    del values[name]
        except FpcompilerError:
            raise
        except STEP_ERRORS as error:
            raise step_error(self._code[index].step, index, error) from error

    def _own(self, out: object, values: Mapping[str, Any]) -> Any:
        """Return an output; if it may share memory with a constant or the state, a copy of it."""
        if not isinstance(out, str):
            return out
        value = values[out]
        return value.clone() if out in self._shared and isinstance(value, Tensor) else value


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ArtifactError(
            f"The plan names the tensor {key!r}, which the artifact does not hold. The artifact is "
            "damaged; compile the model again."
        )
    return tensors[key]


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor as it is in a loaded artifact, so that both give the same bits.

    A matrix product may add in another order when an operand is not aligned or not contiguous.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _assemble(
    plan: Plan, functions: Sequence[operators.Function], device: torch.device
) -> tuple[Instruction, ...]:
    frees = last_uses(plan)
    code = []
    in_place = in_place_updates(plan)
    for index, (step, function) in enumerate(zip(plan.steps, functions, strict=True)):
        code.append(
            Instruction(
                function=write_rows if index in in_place else function,
                args=[operators.decode(arg, device) for arg in step.args],
                kwargs={k: operators.decode(v, device) for k, v in step.kwargs.items()},
                outs=step.outs,
                spread=len(step.outs) > 1 or step.op in operators.QUANTIZERS,
                frees=tuple(frees.get(index, ())),
                step=step,
            )
        )
    return tuple(code)


def _shared_values(plan: Plan, code: Sequence[Instruction]) -> frozenset[str]:
    """Return the values that may share memory with a constant or the state."""
    shared = {*plan.constants, *plan.state}
    for instruction in code:
        aliases = instruction.function is write_rows or operators.aliases(instruction.function)
        if aliases and not shared.isdisjoint(instruction.step.uses()):
            shared.update(instruction.outs)
    return frozenset(shared)
