"""The symbols become operations of ONNX, in a style."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from fpcompiler.errors import ExportError, describe_layer
from fpcompiler.interop.onnx.arithmetic import (
    Grouped,
    Rounded,
    encode,
    encode_power,
    group,
    join,
    quantize,
    round_to,
)
from fpcompiler.interop.onnx.builder import Builder, last_size
from fpcompiler.interop.onnx.styles import StoredWeight, Style, look_up, scaled_elements
from fpcompiler.interop.onnx.symbols import DOMAIN
from fpcompiler.operand import Operand, ScaleLevel
from fpcompiler.runtime.reference import elements

__all__ = ["Lowered", "lower"]


@dataclass(frozen=True)
class Lowered:
    """A weight of the model in ONNX.

    Attributes:
        layer: Its layer.
        operand: What it is, as text.
        k: Values in a row.
        codes: The name of the constant with the codes.
        outer_scale, block_scale: Likewise of the scales; empty where there is none.
    """

    layer: str
    operand: str
    k: int
    codes: str
    outer_scale: str = ""
    block_scale: str = ""


@dataclass(frozen=True)
class _Known:
    """What stands behind codes that the program computes.

    Attributes:
        values, rounded, operand: What was quantized, and what that gave.
        inner: Elements times block scales, ``[..., K]``.
        results: The codes and scales as symbols have them.
    """

    values: Grouped
    rounded: Rounded
    operand: Operand
    inner: ir.Value
    results: tuple[ir.Value, ...]


def lower(model: ir.Model, style: Style) -> list[Lowered]:
    """Replace the symbols of a model in place; return its weights.

    Raises:
        ExportError: If the style cannot express one; the message names the layer.
    """
    lowering = _Lowering(model.graph, style)
    symbols = [node for node in model.graph if node.domain == DOMAIN]
    for node in symbols:
        lowering.express(node)
    for node in reversed(symbols):
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    RemoveUnusedNodesPass()(model)
    return [*lowering.weights.values()]


class _Lowering:
    def __init__(self, graph: ir.Graph, style: Style) -> None:
        self.graph, self.style = graph, style
        self.weights: dict[ir.Value, Lowered] = {}
        self.places: collections.Counter[str] = collections.Counter()
        self.expressed: dict[ir.Value, list[ir.Value]] = {}
        self.known: dict[ir.Value, _Known] = {}
        self.handlers = {
            "Quantize": self._quantize,
            "QuantizeWithin": self._quantize,
            "Encode": self._encode,
            "Dequantize": self._dequantize,
            "Weight": self._weight,
        }

    def express(self, node: ir.Node) -> None:
        """Put operations in front of a symbol, and their results in place of its own."""
        layer = node.attributes.get_string("layer", "")
        operand = Operand.parse(node.attributes.get_string("operand"))
        place = f"{layer}/{node.op_type.lower()}"
        self.places[place] += 1
        count = self.places[place]
        b = Builder(self.graph, layer, place if count == 1 else f"{place}_{count}")
        results = self.handlers[node.op_type](b, node, operand)
        self.graph.insert_before(node, b.nodes)
        for old, new in zip(node.outputs, results, strict=True):
            if new is not None:
                _adopt(old, new)

    def _quantize(self, b: Builder, node: ir.Node, operand: Operand) -> list[ir.Value | None]:
        x, *given = map(_only, node.inputs)
        rank, k = last_size(x, b.layer)
        values = group(b, x, operand, rank, k)
        outer = b.op("Reshape", given[0], b.integers([1] * rank)) if given else None
        rounded = quantize(b, values, operand, outer)
        inner = self.style.activation(b, values, rounded, operand)
        results = self._stored(b, node, values, rounded, operand)
        if given:
            results.pop(1)  # The symbol has no result for what it was given.
        named = tuple(new or old for old, new in zip(node.outputs, results, strict=True))
        self.known[named[0]] = _Known(values, rounded, operand, inner, (*named, *given))
        return results

    def _stored(
        self, b: Builder, node: ir.Node, values: Grouped, rounded: Rounded, operand: Operand
    ) -> list[ir.Value | None]:
        """Return codes and scales in storage form: None where only symbols read them."""
        results: list[ir.Value | None] = [None]
        if _is_read(node.outputs[0]):
            results[0] = _codes(b, values, rounded.elements, operand)
        if operand.outer:
            results.append(rounded.outer)
        if operand.block:
            assert rounded.block is not None
            read = operand.block.is_real or _is_read(node.outputs[-1])
            results.append(_block_codes(b, rounded.block, operand.block) if read else None)
        return results

    def _encode(self, b: Builder, node: ir.Node, operand: Operand) -> list[ir.Value | None]:
        x, *scales = map(_only, node.inputs)
        rank, k = last_size(x, b.layer)
        values = group(b, x, operand, rank, k)
        outer, block = _factors(b, scales, operand)
        total = block if outer is None else _above(b, outer, operand)
        if block is not None and outer is not None:
            total = b.op("Mul", block, total)
        y = values.blocks if total is None else b.op("Div", values.blocks, total)
        rounded = Rounded(round_to(b, y, operand.format), outer, block)
        inner = self.style.activation(b, values, rounded, operand)
        codes = node.outputs[0]
        result = _codes(b, values, rounded.elements, operand) if _is_read(codes) else None
        known = _Known(values, rounded, operand, inner, (result or codes, *scales))
        self.known[known.results[0]] = known
        return [result]

    def _dequantize(self, b: Builder, node: ir.Node, operand: Operand) -> list[ir.Value | None]:
        codes, *scales = map(_only, node.inputs)
        known = self.known.get(codes)
        if known is not None and {*scales} <= {*known.results}:
            return [_dequantized(b, known, operand)]
        rank, k = last_size(codes, b.layer)
        values = group(b, look_up(b, codes, operand.format), operand, rank, k)
        outer, block = _factors(b, scales, operand)
        rounded = Rounded(values.blocks, outer, block)
        inner = scaled_elements(b, values, rounded, operand)
        return [_dequantized(b, _Known(values, rounded, operand, inner, ()), operand)]

    def _weight(self, b: Builder, node: ir.Node, operand: Operand) -> list[ir.Value | None]:
        packed, *scales = map(_only, node.inputs)
        if packed not in self.expressed:
            k = node.attributes.get_int("k")
            self.expressed[packed] = self._express_weight(b, packed, scales, operand, k)
        return [*self.expressed[packed]]

    def _express_weight(
        self, b: Builder, packed: ir.Value, scales: Sequence[ir.Value], operand: Operand, k: int
    ) -> list[ir.Value]:
        tensors = [_stored_tensor(value, b.layer) for value in (packed, *scales)]
        names = [_take_name(value) for value in (packed, *scales)]
        has_outer, has_block = operand.outer is not None, operand.block is not None
        stored = StoredWeight(
            names[0],
            names[-1] if has_block else "",
            tensors[0],
            tensors[-1] if has_block else None,
            elements(operand),
            k,
        )
        results = [self.style.weight(b, stored)]
        if has_outer:
            results.append(b.initializer(names[1], ir.tensor(tensors[1].reshape(-1).numpy())))
        outer = names[1] if has_outer else ""
        self.weights[packed] = Lowered(b.layer, str(operand), k, names[0], outer, stored.block_name)
        return results


def _only(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _is_read(value: ir.Value) -> bool:
    """Return whether something beside a dequantize reads codes or scales."""
    symbols = [node.domain == DOMAIN and node.op_type == "Dequantize" for node, _ in value.uses()]
    return value.is_graph_output() or not all(symbols)


def _adopt(old: ir.Value, new: ir.Value) -> None:
    """Let a value take the place of another."""
    if old.is_graph_output():
        new.name = old.name
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _codes(b: Builder, values: Grouped, element: ir.Value, operand: Operand) -> ir.Value:
    return encode(b, join(b, values, element, operand), operand.format)


def _block_codes(b: Builder, scale: ir.Value, level: ScaleLevel) -> ir.Value:
    scale = b.op("Squeeze", scale, b.integers([-1]))
    if level.spec is None:
        return scale
    return encode(b, scale, level.spec) if level.spec.zero else encode_power(b, scale)


def _factors(
    b: Builder, scales: Sequence[ir.Value], operand: Operand
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the outer scale and those of blocks, ``[..., blocks, 1]``, from storage form."""
    outer = scales[0] if operand.outer else None
    if operand.block is None:
        return outer, None
    spec = operand.block.spec
    factors = scales[-1] if spec is None else look_up(b, scales[-1], spec)
    return outer, b.op("Unsqueeze", factors, b.integers([-1]))


def _above(b: Builder, outer: ir.Value, operand: Operand) -> ir.Value:
    """Return the outer scale with an axis for the values of a block, if there are blocks."""
    return b.op("Unsqueeze", outer, b.integers([-1])) if operand.block else outer


def _dequantized(b: Builder, known: _Known, operand: Operand) -> ir.Value:
    """Return elements times the scales of an operand, coarsest first, ``[..., K]``."""
    if operand.outer is None:
        return known.inner
    outer, block = known.rounded.outer, known.rounded.block
    assert outer is not None
    if operand.block is None or block is None:
        return b.op("Mul", known.rounded.elements, outer)
    total = b.op("Mul", block, _above(b, outer, operand))
    product = b.op("Mul", known.rounded.elements, total)
    return join(b, known.values, product, operand)


def _stored_tensor(value: ir.Value, layer: str) -> Tensor:
    if value.const_value is None:
        raise ExportError(
            f"{describe_layer(layer)}: its weight is computed at each call, and ONNX files hold "
            "quantized weights as constants. Export to pt2, or skip the layer in the scheme."
        )
    return torch.from_numpy(value.const_value.numpy().copy())


def _take_name(value: ir.Value) -> str:
    """Return the name of a constant, which gets another one: nothing or little reads it now."""
    name = value.name or ""
    value.name = f"{name}.stored"
    return name
