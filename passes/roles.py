"""What each layer is in its model, found from the graph alone: see :class:`scheme.Role`.

Blocks are what a residual sum goes past, and attention. A layer that is in none and depends on none
is an embedding; one after them that gives a result is a head.
"""

from __future__ import annotations

from typing import Final

from torch_mlir import ir

from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import operator_name, text_of
from fpcompiler.ir.types import tensor_type
from fpcompiler.passes.layers import LAYER, layer_of
from fpcompiler.passes.origins import Flow, Via, flow_of, has_tokens, inputs_of, same_data
from fpcompiler.scheme import Role

ROLE: Final = "fpq.role"
"""Attribute of a layer: its role."""

_TABLES: Final = frozenset({"torch.aten.embedding", "torch.aten.embedding_bag.padding_idx"})
_NORMS: Final = frozenset(
    f"torch.aten.{name}" for name in ("layer_norm", "native_layer_norm", "rms_norm", "group_norm")
)
_RESULTS: Final = frozenset({"func.return", "ml_program.global_store"})


def layer_roles(program: Program) -> dict[str, Role]:
    """Return the role of each layer of a program at stage ``normalized``, by its name.

    A layer that runs several times has the first role of it that is not ``other``.
    """
    finder = _Finder(flow_of(program))
    roles: dict[str, Role] = {}
    for index in finder.layers:
        name = layer_of(finder.flow.ops[index])
        assert name is not None
        if roles.get(name, Role.OTHER) is Role.OTHER:
            roles[name] = finder.role(index)
    return roles


def mark_roles(program: Program) -> None:
    """Give every operation that is a layer its role, as an attribute."""
    roles = layer_roles(program)
    with program.context():
        for op in program.operations():
            name = layer_of(op)
            if name is not None:
                op.attributes[ROLE] = ir.StringAttr.get(roles[name])


def role_of(op: ir.Operation) -> str:
    """Return the role that a layer was marked with; an empty text for one without."""
    return text_of(op.attributes[ROLE]) if ROLE in op.attributes else ""


class _Finder:
    """Every layer with a role by the index of its operation; what has none is ``other``."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.layers = [i for i, op in enumerate(flow.ops) if LAYER in op.attributes]
        self.modulations = _modulations(flow)
        self.conditions = _conditions(flow, self.modulations)
        self.modulations -= self.conditions
        self.qkv = {i for item in flow.attention for kind, i in item.origins if kind is Via.PLAIN}
        self.heads = _heads(flow)
        self.has_body = any(flow.body)
        self.ffn_in, self.ffn_out = self._feed_forward()

    def role(self, index: int) -> Role:
        """Return the role of the layer with an index, the most telling first."""
        table = operator_name(self.flow.ops[index]) in _TABLES
        reads = {kind for kind, _ in self.flow.inputs[index]}
        answers = (
            (table or index in self.conditions, Role.EMBEDDING),
            (index in self.modulations, Role.MODULATION),
            (index in self.qkv, Role.QKV),
            (Via.ATTENTION in reads, Role.ATTENTION_OUT),
            (index in self.ffn_in, Role.FFN_IN),
            (index in self.heads, Role.HEAD),
            (index in self.ffn_out, Role.FFN_OUT),
            (self._is_first(index), Role.EMBEDDING),
        )
        return next((role for holds, role in answers if holds), Role.OTHER)

    def _is_first(self, index: int) -> bool:
        """Whether a layer comes before all blocks; without a block none does."""
        return self.has_body and not self.flow.body[index] and not self.flow.in_block(index)

    def _feed_forward(self) -> tuple[set[int], set[int]]:
        """Return the layers before an activation, and those after it, in all blocks."""
        before: set[int] = set()
        after: set[int] = set()
        for last in self.layers:
            reads = self.flow.inputs[last]
            kinds = {kind for kind, _ in reads}
            first = {i for kind, i in reads if kind in (Via.ACTIVATED, Via.PLAIN) and i >= 0}
            if Via.ACTIVATED not in kinds or Via.MIXED in kinds:
                continue
            if not any(map(self._is_first, first)):
                before |= first
                after.add(last)
        return before, after


def _heads(flow: Flow) -> set[int]:
    """Return layers of the body whose output, and nothing added to it, is a result."""
    returns = (op for op in flow.ops if op.name == "func.return")
    origins = {item for op in returns for value in op.operands for item in flow.of(value)}
    kinds = (Via.PLAIN, Via.SQUASHED)
    return {i for kind, i in origins if kind in kinds and i >= 0 and flow.body[i]}


def _modulations(flow: Flow) -> set[int]:
    """Return layers that shift, scale or gate tokens by a condition that has none."""
    found: set[int] = set()
    for op in flow.ops:
        if operator_name(op) not in ("torch.aten.mul.Tensor", "torch.aten.add.Tensor"):
            continue
        for condition, tokens in ((0, 1), (1, 0)):
            layer = _condition_layer(flow, op.operands[condition])
            if layer is not None and _is_modulated(flow, op, layer, condition, tokens):
                found.add(layer)
    return found


def _condition_layer(flow: Flow, value: ir.Value) -> int | None:
    """Return the layer without tokens that alone a value comes from."""
    origins = flow.of(value)
    if len(origins) != 1:
        return None
    kind, index = next(iter(origins))
    if kind not in (Via.PLAIN, Via.SQUASHED) or index < 0:
        return None
    return None if any(map(has_tokens, inputs_of(flow.ops[index]))) else index


def _is_modulated(flow: Flow, op: ir.Operation, layer: int, condition: int, tokens: int) -> bool:
    """Whether an operation applies one vector to all tokens, which it was not computed from."""
    stream = op.operands[tokens]
    if not flow.of(stream) or not _is_broadcast(op.operands[condition], stream):
        return False
    source = same_data(stream).owner
    if isinstance(source, ir.Block) or flow.above[layer] >> flow.index[source.operation] & 1:
        return False
    # A shift stands alone only after a norm; a vector added to plain tokens is an embedding.
    return operator_name(op) == "torch.aten.mul.Tensor" or operator_name(source) in _NORMS


def _is_broadcast(vector: ir.Value, tokens: ir.Value) -> bool:
    """Whether a vector of as many channels is applied along an axis of tokens."""
    small, large = tensor_type(vector), tensor_type(tokens)
    if small is None or large is None or len(small.shape) != len(large.shape):
        return False
    if not small.shape or small.shape[-1] in (1, None) or small.shape[-1] != large.shape[-1]:
        return False
    pairs = zip(small.shape[:-1], large.shape[:-1], strict=True)
    return any(a == 1 and b != 1 for a, b in pairs)


def _conditions(flow: Flow, modulations: set[int]) -> set[int]:
    """Return layers that only make the condition which modulations read.

    That a result depends on a layer in another way is followed back from the results, over
    everything but modulations.
    """
    reached = 0
    for index in modulations:
        reached |= flow.above[index] & ~(1 << index)
    live: set[int] = set()
    pending = [i for i, op in enumerate(flow.ops) if op.name in _RESULTS]
    while pending:
        index = pending.pop()
        if index in live or index in modulations:
            continue
        live.add(index)
        owners = (value.owner for value in flow.ops[index].operands)
        pending += [flow.index[o.operation] for o in owners if not isinstance(o, ir.Block)]
    layers = {i for i, op in enumerate(flow.ops) if LAYER in op.attributes}
    return {i for i in layers - live if reached >> i & 1}
