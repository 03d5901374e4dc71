"""Building blocks for passes: globals, constants, torch operations. Nothing here decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch_mlir import ir
from torch_mlir.extras.fx_importer import TORCH_DTYPE_TO_INT, TORCH_DTYPE_TO_MLIR_TYPE

from fpcompiler.ir.types import TensorType, ranked_text, tensor_type

Scalar = bool | int | float | str | None


def torch_global_text(tensor: torch.Tensor) -> str:
    """Return the builtin tensor type of the global that holds a torch tensor, as text."""
    element = TORCH_DTYPE_TO_MLIR_TYPE[tensor.dtype]()
    if isinstance(element, ir.IntegerType):
        # Builtin tensors hold signless integers; only !torch.vtensor knows the sign.
        element = ir.IntegerType.get_signless(element.width)
    return ranked_text(tuple(tensor.shape), str(element))


def symbol(name: str) -> ir.Attribute:
    """Return a reference to a global, quoted where MLIR needs it."""
    return ir.FlatSymbolRefAttr.get(name)


def declare_global(
    module_op: ir.Operation, name: str, type_text: str, *, mutable: bool = False
) -> None:
    """Declare a global whose value lives outside the IR, under the same name."""
    kind = ir.Type.parse(type_text)
    attributes = {
        "sym_name": ir.StringAttr.get(name),
        "sym_visibility": ir.StringAttr.get("private"),
        "type": ir.TypeAttr.get(kind),
        "value": ir.Attribute.parse(f"#ml_program.extern<{kind}>"),
    }
    if mutable:
        attributes["is_mutable"] = ir.UnitAttr.get()
    block = module_op.regions[0].blocks[0]
    functions = [op for op in block.operations if op.operation.name == "func.func"]
    where = ir.InsertionPoint(functions[0]) if functions else ir.InsertionPoint(block)
    with where, ir.Location.unknown():
        ir.Operation.create("ml_program.global", attributes=attributes)


def load_builtin(name: str, type_text: str) -> ir.Value:
    """Load a global as the builtin tensor that it is."""
    kind = ir.Type.parse(type_text)
    return ir.Operation.create(
        "ml_program.global_load",
        results=[kind],
        attributes={"global": symbol(name)},
        loc=_named(name),
    ).result


def _named(name: str) -> ir.Location:
    """Return a location that makes dumps call the value of a global by the global's name."""
    return ir.Location.name(name, ir.Location.unknown())


def load_global(name: str, type_text: str, result: ir.Type) -> ir.Value:
    """Load a global as a torch tensor."""
    loaded = load_builtin(name, type_text)
    return ir.Operation.create(
        "torch_c.from_builtin_tensor", results=[result], operands=[loaded], loc=_named(name)
    ).result


def store_global(name: str, value: ir.Value, type_text: str) -> None:
    """Store a torch tensor in a mutable global."""
    kind = ir.Type.parse(type_text)
    plain = ir.Operation.create(
        "torch_c.to_builtin_tensor", results=[kind], operands=[value]
    ).result
    ir.Operation.create(
        "ml_program.global_store", operands=[plain], attributes={"global": symbol(name)}
    )


def global_of(value: ir.Value) -> str | None:
    """Return the name of the global that a value is the content of, or None if it is computed."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return None
    if owner.name == "torch_c.from_builtin_tensor":
        return global_of(owner.operands[0])
    if owner.name == "ml_program.global_load":
        return symbol_name(owner)
    return None


def symbol_name(op: ir.Operation) -> str:
    """Return the name of the global that a load or store refers to."""
    return str(ir.FlatSymbolRefAttr(op.attributes["global"]).value)


def constant(value: Scalar) -> ir.Value:
    """Return a torch scalar constant (None, bool, int, float or str)."""
    if value is None:
        return _constant("none", "!torch.none", None)
    if isinstance(value, bool):
        return _constant("bool", "!torch.bool", ir.BoolAttr.get(value))
    if isinstance(value, int):
        return _constant(
            "int", "!torch.int", ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)
        )
    if isinstance(value, float):
        return _constant("float", "!torch.float", ir.FloatAttr.get_f64(value))
    return _constant("str", "!torch.str", ir.StringAttr.get(value))


def _constant(kind: str, type_text: str, value: ir.Attribute | None) -> ir.Value:
    attributes = {} if value is None else {"value": value}
    return ir.Operation.create(
        f"torch.constant.{kind}",
        results=[ir.Type.parse(type_text)],
        attributes=attributes,
        loc=ir.Location.unknown(),  # without a name, dumps call a constant by its value: %int2
    ).result


def int_list(values: Sequence[int | ir.Value]) -> ir.Value:
    """Return a list of integers, each a number or a value."""
    items = [constant(v) if isinstance(v, int) else v for v in values]
    return ir.Operation.create(
        "torch.prim.ListConstruct", results=[ir.Type.parse("!torch.list<int>")], operands=items
    ).result


def aten(name: str, operands: Sequence[ir.Value], result: TensorType) -> ir.Value:
    """Return the result of a torch operation such as ``transpose.int``.

    A registered operation is created as such, any other one as ``torch.operator``.
    """
    full = f"torch.aten.{name}"
    if ir.Context.current.is_registered_operation(full):
        return ir.Operation.create(full, results=[result.to_mlir()], operands=list(operands)).result
    return ir.Operation.create(
        "torch.operator",
        results=[result.to_mlir()],
        operands=list(operands),
        attributes={"name": ir.StringAttr.get(full)},
    ).result


def transposed(value: ir.Value) -> ir.Value:
    """Return a tensor with its last two axes exchanged."""
    kind = tensor_type(value)
    assert kind is not None
    shape = (*kind.shape[:-2], kind.shape[-1], kind.shape[-2])
    axes = [constant(-1), constant(-2)]
    return aten("transpose.int", [value, *axes], TensorType(shape, kind.element))


def cast(value: ir.Value, element: str) -> ir.Value:
    """Return a tensor with another element type; the tensor itself if it has it already."""
    kind = tensor_type(value)
    assert kind is not None
    if kind.element == element:
        return value
    wanted = TensorType(kind.shape, element)
    options = [constant(v) for v in (TORCH_DTYPE_TO_INT[wanted.dtype], False, False, None)]
    return aten("to.dtype", [value, *options], wanted)


def size_of(value: ir.Value, axis: int) -> ir.Value:
    """Return the size of an axis as a torch integer."""
    return ir.Operation.create(
        "torch.aten.size.int",
        results=[ir.Type.parse("!torch.int")],
        operands=[value, constant(axis)],
    ).result


def scalar_op(name: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return the result of an integer operation such as ``mul.int``."""
    return ir.Operation.create(
        f"torch.aten.{name}", results=[ir.Type.parse("!torch.int")], operands=[a, b]
    ).result
