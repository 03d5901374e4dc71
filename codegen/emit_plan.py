"""A lowered program as a plan: plain data and tensors, which the runtime executes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from fpcompiler.codegen.layer_table import layer_rows
from fpcompiler.errors import ArtifactError, IRError
from fpcompiler.ir.program import Program
from fpcompiler.ir.raise_to_fx import raise_to_fx
from fpcompiler.plan import Argument, Placeholder, Plan, Signature, Step, Symbol
from fpcompiler.runtime import operators
from fpcompiler.tree import are_leaves

_SCALAR_NAMES: Final[Mapping[Callable[..., Any], str]] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.floordiv: "floordiv",
    operator.truediv: "truediv",
    operator.mod: "mod",
    operator.pow: "pow",
    operator.neg: "neg",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.le: "le",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.getitem: "getitem",
    torch.sym_max: "sym_max",
    torch.sym_min: "sym_min",
    torch.sym_float: "sym_float",
}


def emit_plan(
    program: Program,
    signature: Signature,
    placeholders: tuple[Placeholder, ...],
    symbols: Mapping[str, Symbol],
) -> tuple[Plan, dict[str, Tensor]]:
    """Return the plan of a program at stage ``lowered``, and the tensors that it names.

    Tensors that are one in the program (tied weights) are one in the result.

    Args:
        program: The program.
        signature: How the model is called.
        placeholders: The tensors that a call passes in, in order of the program's arguments.
        symbols: Ranges of the sizes that may vary.

    Raises:
        IRError: If the program holds an operation that a plan cannot express.
    """
    emitter = _Emitter(raise_to_fx(program), placeholders, are_leaves(signature.outputs))
    emitter.run()
    plan = Plan(
        signature=signature,
        placeholders=placeholders,
        steps=tuple(emitter.steps),
        outputs=tuple(emitter.outputs),
        symbols=dict(symbols),
        constants={k: v for k, v in emitter.loads.items() if k not in emitter.state},
        state=emitter.state,
        stores=tuple(emitter.stores),
        layers=layer_rows(program),
    )
    return plan, emitter.tensors


class _Emitter:
    def __init__(
        self,
        module: fx.GraphModule,
        placeholders: tuple[Placeholder, ...],
        computed: Sequence[bool],
    ) -> None:
        self.module = module
        self.inputs = iter(placeholders)
        self.computed = computed  # Of each result: the others are part of the signature.
        self.names: dict[fx.Node, str] = {}
        self.steps: list[Step] = []
        self.outputs: list[Any] = []
        self.loads: dict[str, str] = {}
        self.state: dict[str, str] = {}
        self.stores: list[tuple[str, str]] = []
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[tuple[Any, ...], str] = {}

    def run(self) -> None:
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = next(self.inputs).name
            elif node.op == "get_attr":
                self._load(node)
            elif node.op == "output":
                results = zip(node.args[0], self.computed, strict=True)
                self.outputs = [self._output(value) for value, computed in results if computed]
            elif node.target is torch.ops.aten.copy_.default:
                self._store(node)
            elif node not in self.names:
                self._call(node)

    def _name(self, node: fx.Node) -> str:
        # Graph names are unique among themselves; inputs bring their own.
        return f"%{node.name}"

    def _load(self, node: fx.Node) -> None:
        key = self.module.meta["globals"][node.target]
        tensor = getattr(self.module, str(node.target))
        name = self._name(node)
        self.names[node] = name
        if _is_written(node):
            # The captured model goes on writing to its own buffer.
            tensor = tensor.clone()
        self.loads[name] = self._tensor_key(key, tensor)

    def _tensor_key(self, key: str, tensor: Tensor) -> str:
        """Store a tensor under a key, unless the same memory is stored already."""
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in self._keys:
            return self._keys[place]
        self._keys[place] = key
        self.tensors[key] = tensor
        return key

    def _store(self, node: fx.Node) -> None:
        target, value = node.args
        assert isinstance(target, fx.Node)
        assert isinstance(value, fx.Node)
        self.state[self.names[target]] = self.loads[self.names[target]]
        self.stores.append((self.names[value], self.names[target]))

    def _output(self, value: Any) -> Any:
        return self.names[value] if isinstance(value, fx.Node) else value

    def _call(self, node: fx.Node) -> None:
        outs = self._results(node)
        name = _operator_name(node)
        _check_operator(name, node)
        self.steps.append(
            Step(
                op=name,
                args=tuple(self._encode(argument) for argument in node.args),
                outs=outs,
                kwargs={key: self._encode(value) for key, value in node.kwargs.items()},
                layer=node.meta.get("layer", ""),
                kernel=node.meta.get("kernel", ""),
            )
        )

    def _results(self, node: fx.Node) -> tuple[str, ...]:
        """Name the results; those of an operator of ours that returns a list, one by one."""
        if node.target not in _LISTS:
            self.names[node] = self._name(node)
            return (self._name(node),)
        for user in node.users:
            self.names[user] = f"{self._name(node)}.{user.args[1]}"
        return tuple(f"{self._name(node)}.{i}" for i in range(len(node.users)))

    def _encode(self, value: Any) -> Argument:
        if isinstance(value, fx.Node):
            return {"v": self.names[value]}
        if isinstance(value, list | tuple):
            return [self._encode(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"f": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        for kind, key in _MARKED:
            if isinstance(value, kind):
                return {key: str(value).removeprefix("torch.")}
        raise IRError(f"a plan cannot hold an argument of type {type(value).__name__}: {value!r}")


_LISTS: Final = (
    torch.ops.fpc.quantize.default,
    torch.ops.fpc.fused_quantize.default,
    torch.ops.fpc.quantize_within.default,
    torch.ops.fpc.fold.default,
)
"""Operators of ours that return several tensors."""

_MARKED: Final = (
    (torch.dtype, "dtype"),
    (torch.device, "device"),
    (torch.layout, "layout"),
    (torch.memory_format, "memory_format"),
)


def _is_written(node: fx.Node) -> bool:
    return any(user.target is torch.ops.aten.copy_.default for user in node.users)


def _check_operator(name: str, node: fx.Node) -> None:
    """Refuse here what the runtime would refuse when it loads the plan: the model is at hand."""
    try:
        operators.resolve(name)
    except ArtifactError as error:
        raise IRError(
            f"{node.meta.get('place', node.name)}: a compiled program cannot hold {name}. Replace "
            "it by other operations of torch, or do it outside of the compiled part."
        ) from error


def _operator_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, base = target._schema.name.partition("::")
        if namespace == "fpc":
            return f"fpc.{base}"
        if namespace == "aten":
            return f"aten.{base}.{target._schema.overload_name or 'default'}"
    if target in _SCALAR_NAMES:
        return f"py.{_SCALAR_NAMES[target]}"  # type: ignore[index]
    raise IRError(
        f"{node.meta.get('place', node.name)}: a compiled program cannot hold {target}; only aten "
        "operators can be part of it. Replace it in the model by operations of torch."
    )
