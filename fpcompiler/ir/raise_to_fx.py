"""MLIR back to an executable ``torch.fx.GraphModule``, possible at every stage of a program.

The inverse of torch-mlir's importer. Before quantization the result computes the same bits as the
captured model; after it, ``fpc::`` operators stand where the IR has ``fpq`` operations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch_mlir import ir

import fpcompiler.runtime.ops  # noqa: F401  (registers the fpc:: operators)
from fpcompiler.ir.build import symbol_name
from fpcompiler.ir.dialect import SCALE_SLOTS, scale_slots
from fpcompiler.ir.linear import GEMMS, activation_of
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import constant_value, literal_value, resolve, text_of
from fpcompiler.ir.types import QuantizedType, quantized_type, tensor_type

_IGNORED: Final = frozenset(
    {"torch.symbolic_int", "torch.bind_symbolic_shape", "torch.aten._assert_tensor_metadata"}
)


def raise_to_fx(program: Program) -> fx.GraphModule:
    """Return the program as a GraphModule whose placeholders are the program's inputs.

    A node that holds the output of a layer has the layer's name as ``meta["layer"]``, one that runs
    a chosen kernel has it as ``meta["kernel"]``, and as ``meta["activation"]`` the activation that
    it computes of that output, or an empty text; ``meta["place"]`` is where in the model a node
    comes from, in words, and ``meta["module"]`` the path of the module that ran it.
    ``meta["globals"]`` of the module maps its attributes to the names of globals. Mutable globals
    are updated in place, at the end.

    Raises:
        IRError: If an operation cannot be executed.
    """
    with program.context():
        return Raiser(program).run()


class Raiser:
    """Builds the graph; ``handlers`` says what becomes of operations that are not torch's."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.kept: tuple[ir.Value, ...] = ()
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.values: dict[ir.Value, Any] = {}
        self.globals: dict[str, str] = {}
        self.loads: dict[str, fx.Node] = {}
        self.stores: list[tuple[str, Any]] = []
        self.handlers: dict[str, Callable[[ir.Operation, list[Any]], Any]] = {
            "ml_program.global_load": self._load,
            "ml_program.global_store": self._store,
            "torch_c.from_builtin_tensor": lambda op, args: args[0],
            "torch_c.to_builtin_tensor": lambda op, args: args[0],
            "torch.prim.ListConstruct": lambda op, args: list(args),
            "torch.prim.ListUnpack": self._unpack,
            "torch.vtensor.literal": self._literal,
            "fpq.quantize": self._quantize,
            "fpq.fused_quantize": self._fused_quantize,
            "fpq.encode": self._encode,
            "fpq.dequantize": self._dequantize,
            "fpq.assemble": lambda op, args: [arg for arg in args if arg is not None],
            "fpq.disassemble": self._disassemble,
            "fpq.fold": self._fold,
            "fpq.hadamard": self._hadamard,
            **dict.fromkeys(("fpq.linear", *GEMMS), self._linear),
        }

    def keep(self, values: Sequence[ir.Value]) -> None:
        """Keep the nodes of some values, also where nothing in the graph reads them."""
        self.kept = tuple(values)

    def run(self) -> fx.GraphModule:
        """Return the graph of the whole program."""
        for number, argument in enumerate(self.program.body.arguments):
            self.values[argument] = self.graph.placeholder(f"arg{number}")
        for op in self.program.operations():
            if op.name == "func.return":
                self._return(op)
                break
            self._operation(op)
        kept = {self.values[value] for value in self.kept}
        self.graph.eliminate_dead_code(lambda node: _has_effect(node) or node in kept)
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        module.meta["globals"] = dict(self.globals)
        return module

    def _operation(self, op: ir.Operation) -> None:
        args = [self.values[value] for value in op.operands]
        before = len(self.graph.nodes)
        if op.name in _IGNORED:
            result: Any = None
        elif op.name.startswith("torch.constant."):
            result = constant_value(op)
        elif op.name in self.handlers:
            result = self.handlers[op.name](op, args)
        else:
            result = self._torch(op, args)
        self._bind(op, result)
        self._annotate(op, before)

    def _bind(self, op: ir.Operation, result: Any) -> None:
        if len(op.results) == 1:
            self.values[op.results[0]] = result
            return
        for value, item in zip(op.results, result or (), strict=True):
            self.values[value] = item

    def _annotate(self, op: ir.Operation, before: int) -> None:
        """Tell the nodes that an operation made where they come from."""
        created = len(self.graph.nodes) - before
        if not created:
            return
        place = place_of(op)
        words = str(place)
        node = self.graph._root.prev
        for _ in range(created):
            node.meta |= {"place": words, "module": place.layer}
            node = node.prev
        last, attributes = self.graph._root.prev, op.attributes
        if "fpq.layer" in attributes:
            last.meta["layer"] = text_of(attributes["fpq.layer"])
        if "kernel" in attributes:
            last.meta["kernel"] = text_of(attributes["kernel"])
            last.meta["activation"] = activation_of(op)

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        return self.graph.call_function(function, args, kwargs or {})

    def _global(self, name: str) -> fx.Node:
        # One node for each: what is stored to must be what is read.
        if name not in self.loads:
            key = f"g{len(self.globals)}"
            self.globals[key] = name
            self.root.register_buffer(key, self.program.weights[name])
            self.loads[name] = self.graph.get_attr(key)
        return self.loads[name]

    def _load(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        return self._global(symbol_name(op))

    def _store(self, op: ir.Operation, args: list[Any]) -> None:
        self.stores.append((symbol_name(op), args[0]))

    def _return(self, op: ir.Operation) -> None:
        results = [self.values[value] for value in op.operands]
        # Stores come last: a value loaded before must not change under its readers.
        for name, value in self.stores:
            self._call(torch.ops.aten.copy_.default, (self._global(name), value))
        self.graph.output(tuple(results))

    def _unpack(self, op: ir.Operation, args: list[Any]) -> list[fx.Node]:
        return [self._call(operator.getitem, (args[0], i)) for i in range(len(op.results))]

    def _literal(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        key = f"g{len(self.globals)}"
        self.globals[key] = f"literal.{len(self.globals)}"
        self.root.register_buffer(key, literal_value(op))
        return self.graph.get_attr(key)

    def _torch(self, op: ir.Operation, args: list[Any]) -> Any:
        node = self._call(*resolve(op, args))
        if len(op.results) < 2:
            return node
        return [self._call(operator.getitem, (node, i)) for i in range(len(op.results))]

    def _quantize(self, op: ir.Operation, args: list[Any]) -> list[fx.Node]:
        return self._parts(op, torch.ops.fpc.quantize.default, args)

    def _fused_quantize(self, op: ir.Operation, args: list[Any]) -> list[fx.Node]:
        eps = ir.FloatAttr(op.attributes["eps"]).value
        called = [*args, text_of(op.attributes["producer"]), eps]
        return self._parts(op, torch.ops.fpc.fused_quantize.default, called)

    def _parts(self, op: ir.Operation, function: Any, args: list[Any]) -> list[fx.Node]:
        """Call a quantizer; return the codes and the scales of each level."""
        kind = quantized_type(op.results[0])
        assert kind is not None
        node = self._call(function, (*args, str(kind.operand), place_of(op).layer))
        count = 1 + len(kind.operand.levels)
        return [self._call(operator.getitem, (node, i)) for i in range(count)]

    def _encode(self, op: ir.Operation, args: list[Any]) -> list[fx.Node]:
        kind = quantized_type(op.results[0])
        assert kind is not None
        scales = [arg for arg in args[1:] if arg is not None]
        if len(scales) < len(kind.operand.levels):
            called = (args[0], scales[0], str(kind.operand), place_of(op).layer)
            node = self._call(torch.ops.fpc.quantize_within.default, called)
            codes, block = (self._call(operator.getitem, (node, i)) for i in range(2))
            return [codes, scales[0], block]
        called = (args[0], scales, str(kind.operand), place_of(op).layer)
        return [self._call(torch.ops.fpc.encode.default, called), *scales]

    def _dequantize(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        kind, result = quantized_type(op.operands[0]), tensor_type(op.results[0])
        assert kind is not None
        assert result is not None
        parts = args[0]
        if op.operands[0].owner.name == "fpq.assemble":
            shape = (parts[0], kind.operand.format.storage_bits, kind.shape[-1])
            parts = [self._call(torch.ops.fpc.unpack.default, shape), *parts[1:]]
        return self._call(
            torch.ops.fpc.dequantize.default, (parts, str(kind.operand), result.dtype)
        )

    def _disassemble(self, op: ir.Operation, args: list[Any]) -> list[fx.Node | None]:
        kind = quantized_type(op.operands[0])
        assert kind is not None
        codes, *scales = self._packed(op.operands[0], args[0], kind)
        by_slot = dict(zip(scale_slots(kind), scales, strict=True))
        return [codes, *(by_slot.get(slot) for slot in SCALE_SLOTS)]

    def _fold(self, op: ir.Operation, args: list[Any]) -> list[fx.Node]:
        before, after = quantized_type(op.operands[0]), quantized_type(op.results[0])
        assert before is not None
        assert after is not None
        (codes, *scales), powers = args
        shift = ir.IntegerAttr(op.attributes["shift"]).value
        called = (codes, scales, powers, str(before.operand), str(after.operand), shift)
        node = self._call(torch.ops.fpc.fold.default, called)
        return [self._call(operator.getitem, (node, i)) for i in range(1 + len(scales))]

    def _hadamard(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        block = ir.IntegerAttr(op.attributes["block"]).value
        return self._call(torch.ops.fpc.hadamard.default, (args[0], block))

    def _linear(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        x, weight, bias, *residual = args
        x_kind, w_kind = quantized_type(op.operands[0]), quantized_type(op.operands[1])
        result = tensor_type(op.results[0])
        assert w_kind is not None
        assert result is not None
        packed = self._packed(op.operands[1], weight, w_kind)
        inputs = [x] if x_kind is None else x
        texts = ("" if x_kind is None else str(x_kind.operand), str(w_kind.operand))
        layer, activation = text_of(op.attributes["layer"]), activation_of(op)
        # Left out where there are none, so that such plans are what they were without them.
        rest = (layer, activation, *residual) if activation or residual else (layer,)
        args_out = (inputs, packed, bias, *texts, w_kind.shape[1], result.dtype, *rest)
        return self._call(torch.ops.fpc.linear.default, args_out)

    def _packed(self, value: ir.Value, parts: list[fx.Node], kind: QuantizedType) -> list[fx.Node]:
        """Pack the codes of what is still computed; what is stored is packed already."""
        if value.owner.name == "fpq.assemble":
            return parts
        bits = kind.operand.format.storage_bits
        return [self._call(torch.ops.fpc.pack.default, (parts[0], bits)), *parts[1:]]


def _has_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or node.target is torch.ops.aten.copy_.default
