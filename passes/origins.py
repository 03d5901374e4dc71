"""Where the values of a program come from: through which layers, activations and attention.

One walk over the operations in program order. Views, norms, casts, rotary embeddings and products
with constants hand on the origins of what they read; a layer, an attention and a sum of unlike
things start anew. Names are never looked at.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch_mlir import ir

from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import operator_name
from fpcompiler.ir.types import tensor_type
from fpcompiler.passes.layers import LAYER, weights_of


class Via(enum.Enum):
    """What a value has gone through since its origin."""

    PLAIN = "plain"
    """Nothing that matters: the output of a layer, views and norms of it."""
    SQUASHED = "squashed"
    """``tanh``, ``sigmoid`` or ``erf``: an activation only where it multiplies its own input."""
    ACTIVATED = "activated"
    """GELU, SiLU, ReLU or one of their kind, fused or spelled out."""
    SCORES = "scores"
    """The products of queries and keys, their scale and mask."""
    WEIGHTS = "weights"
    """The softmax of such products."""
    ATTENTION = "attention"
    """Attention: values weighted and summed."""
    MIXED = "mixed"
    """A sum of unlike things, such as a residual stream."""


Origin = tuple[Via, int]
"""How, and the index of the operation (a negative one: an argument) that the value comes from."""
Origins = frozenset[Origin]

_NOTHING: Final[Origins] = frozenset()

_SDPA: Final = "torch.aten.scaled_dot_product_attention"
_PRODUCTS: Final = {
    "torch.aten.matmul": (0, 1), "torch.aten.bmm": (0, 1), "torch.aten.mm": (0, 1),
    "torch.aten.baddbmm": (1, 2),
}  # fmt: skip
"""Products of two computed matrices, and where these stand."""
_SOFTMAX: Final = frozenset(
    {"torch.aten.softmax.int", "torch.aten._softmax", "torch.aten._safe_softmax"}
)
_ACTIVATIONS: Final = frozenset(
    f"torch.aten.{name}"
    for name in (
        "gelu", "silu", "relu", "relu6", "leaky_relu", "elu", "mish", "hardswish", "glu"
    )
)  # fmt: skip
_SQUASHING: Final = frozenset(f"torch.aten.{name}" for name in ("tanh", "sigmoid", "erf"))
_SUMS: Final = frozenset({"torch.aten.add.Tensor", "torch.aten.sub.Tensor"})
_FACTORS: Final = frozenset({"torch.aten.mul.Tensor", "torch.aten.div.Tensor"})
_SAME_DATA: Final = frozenset(
    f"torch.aten.{name}"
    for name in (
        "to.dtype", "contiguous", "clone", "view", "_unsafe_view", "reshape", "permute",
        "transpose.int", "flatten.using_ints", "unflatten.int", "unsqueeze", "squeeze.dim",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """One attention: what its queries, keys and values come from."""

    index: int
    origins: Origins


@dataclass(frozen=True)
class Flow:
    """What is known about every operation of a program, by its index in it.

    Attributes:
        ops: The operations in program order.
        index: The index of each.
        origins: Where its result comes from.
        inputs: Of a layer: where what it reads comes from.
        above: Bits of all operations and arguments that it depends on, itself included.
        body: Whether it depends on an attention or on a residual sum.
        attention: Every attention.
        sums: Every residual sum: the bit of the value that goes past, and the bits above the other.
    """

    ops: tuple[ir.Operation, ...]
    index: dict[ir.Operation, int]
    origins: tuple[Origins, ...]
    inputs: dict[int, Origins]
    above: tuple[int, ...]
    body: tuple[bool, ...]
    attention: tuple[Attention, ...]
    sums: tuple[tuple[int, int], ...]

    def in_block(self, index: int) -> bool:
        """Return whether an operation lies in a branch that a value goes past and is added to."""
        above = self.above[index] & ~(1 << index)
        return any(above & past and made >> index & 1 for past, made in self.sums)

    def of(self, value: ir.Value) -> Origins:
        """Return where a value comes from."""
        if isinstance(value.owner, ir.Block):
            return frozenset({(Via.PLAIN, _argument(value))})
        return self.origins[self.index[value.owner.operation]]


def flow_of(program: Program) -> Flow:
    """Follow the values of a program at stage ``normalized`` whose layers have names."""
    walk = _Walk(program)
    for op in walk.ops:
        walk.visit(op)
    return Flow(
        walk.ops,
        walk.index,
        tuple(walk.origins),
        walk.inputs,
        tuple(walk.above),
        tuple(walk.body),
        tuple(walk.attention),
        tuple(walk.sums),
    )


def inputs_of(op: ir.Operation) -> list[ir.Value]:
    """Return what a layer reads: its operands without the weights."""
    weights = set(weights_of(op))
    return [value for value in op.operands if value not in weights]


def same_data(value: ir.Value) -> ir.Value:
    """Return the value that a value is a view or a cast of."""
    while not isinstance(value.owner, ir.Block) and operator_name(value.owner) in _SAME_DATA:
        value = value.owner.operands[0]
    return value


class _Walk:
    def __init__(self, program: Program) -> None:
        self.ops = tuple(program.operations())
        self.index = {op: i for i, op in enumerate(self.ops)}
        self.origins: list[Origins] = []
        self.inputs: dict[int, Origins] = {}
        self.above: list[int] = []
        # Bits of what an operation depends on through at least one layer or attention.
        self.computed: list[int] = []
        self.body: list[bool] = []
        self.attention: list[Attention] = []
        self.sums: list[tuple[int, int]] = []
        # What each product of queries and keys was computed from.
        self.scores: dict[int, Origins] = {}

    def visit(self, op: ir.Operation) -> None:
        """Add what follows from the operands of the next operation."""
        here, values = len(self.origins), list(op.operands)
        if not _holds_tensors(op):  # a size says nothing about values
            values = []
        found = [self._of(value) for value in values]
        starts = LAYER in op.attributes or self._is_attention(op, found)
        self.above.append(self._bit(here))
        self.computed.append(0)
        self.body.append(False)
        for value in values:
            above, computed, body = self._known(value)
            self.above[here] |= above
            self.computed[here] |= above if starts else computed
            self.body[here] |= body
        self.origins.append(self._origins(op, here, found) if values else _NOTHING)

    def _known(self, value: ir.Value) -> tuple[int, int, bool]:
        if isinstance(value.owner, ir.Block):
            return self._bit(_argument(value)), 0, False
        i = self.index[value.owner.operation]
        return self.above[i], self.computed[i], self.body[i]

    def _bit(self, index: int) -> int:
        return 1 << (index if index >= 0 else len(self.ops) - 1 - index)

    def _of(self, value: ir.Value) -> Origins:
        if isinstance(value.owner, ir.Block):
            return frozenset({(Via.PLAIN, _argument(value))})
        return self.origins[self.index[value.owner.operation]]

    def _is_attention(self, op: ir.Operation, found: Sequence[Origins]) -> bool:
        """Whether an operation is attention, or the product of its weights and values."""
        name = operator_name(op)
        if name == _SDPA:
            return True
        places = _PRODUCTS.get(name, ())
        return bool(found) and any(_picked(found[i], Via.WEIGHTS) for i in places)

    def _origins(self, op: ir.Operation, here: int, found: list[Origins]) -> Origins:
        name = operator_name(op)
        if LAYER in op.attributes:
            self.inputs[here] = frozenset().union(*(self._of(v) for v in inputs_of(op)))
            return frozenset({(Via.PLAIN, here)})
        if name == _SDPA:
            return self._attend(here, frozenset().union(*found[:3]))
        if name in _PRODUCTS:
            return self._product(here, [found[i] for i in _PRODUCTS[name]])
        if name in _SUMS:
            self._note_residual(op, here)
            return _sum(found[0], found[1])
        return _passed(name, found)

    def _attend(self, here: int, origins: Origins) -> Origins:
        self.attention.append(Attention(here, origins))
        self.body[here] = True
        return frozenset({(Via.ATTENTION, here)})

    def _product(self, here: int, factors: list[Origins]) -> Origins:
        together = factors[0] | factors[1]
        weights = _picked(together, Via.WEIGHTS)
        if not weights:
            self.scores[here] = together
            return frozenset({(Via.SCORES, here)})
        values = {item for item in together if item[0] is not Via.WEIGHTS}
        return self._attend(here, frozenset(values).union(*(self.scores[i] for i in weights)))

    def _note_residual(self, op: ir.Operation, here: int) -> None:
        """Find a sum of a value and of what layers have made of it."""
        for value, made in ((0, 1), (1, 0)):
            if not self._of(op.operands[value]):  # a constant, such as positions
                continue
            above, computed, _ = self._known(op.operands[made])
            owner = same_data(op.operands[value])
            block = isinstance(owner.owner, ir.Block)
            index = _argument(owner) if block else self.index[owner.owner.operation]
            if computed & self._bit(index):
                self.body[here] = True
                self.sums.append((self._bit(index), above))


def _holds_tensors(op: ir.Operation) -> bool:
    kinds = (str(result.type) for result in op.results)
    return any(kind.startswith(("!torch.vtensor", "!torch.list<vtensor")) for kind in kinds)


def _argument(value: ir.Value) -> int:
    return -1 - int(ir.BlockArgument(value).arg_number)


def _picked(origins: Origins, via: Via) -> set[int]:
    return {index for kind, index in origins if kind is via}


def _passed(name: str, found: list[Origins]) -> Origins:
    """Return the origins of the result of an operation that is neither layer nor product."""
    together = frozenset().union(*found)
    scores = _picked(together, Via.SCORES)
    if name in _SOFTMAX:  # of anything but scores: routing, mixing; what it weighs is not its input
        return frozenset((Via.WEIGHTS, index) for index in scores)
    if scores:  # a mask or a bias beside scores
        return frozenset((Via.SCORES, index) for index in scores)
    if name in _ACTIVATIONS:
        return _through(together, Via.ACTIVATED)
    if name in _SQUASHING:
        return _through(together, Via.SQUASHED)
    return _gated(together) if name in _FACTORS else together


def _through(origins: Origins, via: Via) -> Origins:
    plain = (Via.PLAIN, Via.SQUASHED)
    return frozenset((via, i) if kind in plain else (kind, i) for kind, i in origins)


def _gated(origins: Origins) -> Origins:
    """Return the origins of a product: ``x * sigmoid(x)`` is an activation of ``x``."""
    own = _picked(origins, Via.SQUASHED) & _picked(origins, Via.PLAIN)
    rest = {(kind, i) for kind, i in origins if kind is not Via.SQUASHED or i not in own}
    return frozenset(rest | {(Via.ACTIVATED, i) for i in own})


def _sum(a: Origins, b: Origins) -> Origins:
    """Return the origins of a sum: both, if it is one of parts of the same, as in a rotation.

    The sines and cosines of a rotation may be arguments.
    """
    scores = _picked(a | b, Via.SCORES)
    if scores:
        return frozenset((Via.SCORES, index) for index in scores)
    inner = [{item for item in side if item[1] >= 0} for side in (a, b)]
    same = inner[0] == inner[1] and (inner[0] or a == b)
    return a | b if not a or not b or same else frozenset({(Via.MIXED, 0)})


def has_tokens(value: ir.Value) -> bool:
    """Whether a tensor has axes of size above 1 between its first and its last."""
    kind = tensor_type(value)
    return kind is not None and any(size != 1 for size in kind.shape[1:-1])
