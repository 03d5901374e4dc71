"""What kernels must quantize so that the layers of a plan can run on kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

from fpcompiler.operand import Operand
from fpcompiler.plan import Step
from fpcompiler.runtime.cuda import QuantizeProblem
from fpcompiler.runtime.cuda.codes import kind_of
from fpcompiler.runtime.cuda.form import InputKind
from fpcompiler.runtime.cuda.quantizers import NOTHING, problem_of, type_names
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.layer_steps import shared_quantizers
from fpcompiler.runtime.operators import Function

__all__ = ["Quantizers", "quantize_problems"]

_X_OPERAND: Final = 3
_K: Final = 5
_PLAIN: Final = 3  # arguments of fpc.quantize: values, operand and layer


class Quantizers(NamedTuple):
    """What kernels must quantize.

    Attributes:
        layers: The problem of each layer's input, by the layer's name; without those whose input
            no kernel makes: torch quantizes it then.
        codes: Those of quantizers whose codes something else reads.
    """

    layers: dict[str, QuantizeProblem]
    codes: tuple[QuantizeProblem, ...]


def quantize_problems(
    executor: Executor, leaves: Sequence[Tensor], elements: Mapping[str, str]
) -> Quantizers:
    """Return what quantizes in a plan; the runtime looks for kernels that solve these problems.

    A plan does not say of what types its values are, so a call is run. Its results are thrown away,
    and the state of the executor stays as it is.

    Args:
        executor: Runs the plan, anywhere.
        leaves: The tensors of a call, such as the recorded one.
        elements: The format in which kernels read a layer's input, by the layer's name; layers
            that have no kernels are left out.
    """
    plan = executor.plan
    kinds = {
        index: InputKind(Operand.parse(step.args[_X_OPERAND]), step.args[_K], elements[step.layer])
        for index, step in enumerate(plan.steps)
        if step.op == "fpc.linear" and step.layer in elements and step.args[_X_OPERAND]
    }
    shared = shared_quantizers(plan, kinds)
    made_by = {out: index for index in shared for out in plan.steps[index].outs}
    found: dict[int, QuantizeProblem] = {}
    codes: dict[QuantizeProblem, None] = {}

    def look(step: Step, function: Function, args: list[Any], kwargs: dict[str, Any]) -> Any:
        index = made_by.get(step.outs[0])
        if index is not None:
            tensors = args[:5] if len(args) > _PLAIN else args[:1]
            producer = args[5] if len(args) > _PLAIN else ""
            problem = problem_of(kinds[shared[index]], producer, type_names(tensors))
            if problem is not None:
                found[index] = problem
        elif (kind := kind_of(step)) is not None:
            problem = problem_of(kind, "", type_names((*args[:1], *NOTHING)))
            if problem is not None:
                codes[problem] = None
        return function(*args, **kwargs)

    executor.fresh().run_leaves(leaves, caller=look)
    inputs = {out: found[index] for out, index in made_by.items() if index in found}
    layers = {
        plan.steps[index].layer: inputs[name]
        for index in kinds
        for name in plan.steps[index].uses()
        if name in inputs
    }
    return Quantizers(layers, tuple(codes))
