"""Small plans built by hand, with the eager model that each one stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpcompiler.artifact import Artifact, Golden
from fpcompiler.numerics import dequantize, pack, quantize
from fpcompiler.operand import Operand
from fpcompiler.plan import LayerRow, Parameter, Placeholder, Plan, Signature, Step, Symbol
from fpcompiler.tree import LEAF, NONE

WEIGHT = "f4E2M1FN@row:f32/block32:f8E8M0FNU"
ACTIVATION = "f6E2M3FN@block32:f8E8M0FNU"


def value(name: str) -> dict[str, str]:
    return {"v": name}


def aten(name: str, *args: Any, out: str, layer: str = "", **kwargs: Any) -> Step:
    return Step(f"aten.{name}", args, (out,), kwargs, layer)


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer as a plan has it."""

    name: str
    weight: str
    activation: str
    tensors: dict[str, Tensor]
    n: int
    k: int

    @classmethod
    def of(
        cls, name: str, linear: nn.Linear, weight: str = WEIGHT, activation: str = ACTIVATION
    ) -> PackedLinear:
        operand = Operand.parse(weight)
        codes, scales = quantize(linear.weight, operand)
        parts = (pack(codes, operand.format.storage_bits), *scales)
        tensors = {f"{name}.w{i}": part for i, part in enumerate(parts)}
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.detach().clone()
        return cls(name, weight, activation, tensors, *linear.weight.shape)

    def steps(self, x: str, out: str) -> list[Step]:
        levels = len(Operand.parse(self.activation).levels) if self.activation else 0
        quantized = tuple(f"{out}.q{i}" for i in range(1 + levels))
        weights = [value(key) for key in self.tensors if not key.endswith("bias")]
        bias = value(f"{self.name}.bias") if f"{self.name}.bias" in self.tensors else None
        steps = []
        if self.activation:
            args = (value(x), self.activation, self.name)
            steps.append(Step("fpc.quantize", args, quantized, {}, self.name))
        inputs = [value(q) for q in quantized] if self.activation else [value(x)]
        args = (inputs, weights, bias, self.activation, self.weight, self.k)
        args = (*args, {"dtype": "float32"}, self.name)
        return [*steps, Step("fpc.linear", args, (out,), {}, self.name, "reference")]

    def row(self) -> LayerRow:
        after = sum(t.nbytes for key, t in self.tensors.items() if not key.endswith("bias"))
        kinds = (self.weight, self.activation or "float32", "reference", "scheme")
        return LayerRow(
            self.name, "linear", (self.n, self.k), *kinds, self.n * self.k * 4, after, True, "*"
        )


class Mlp(nn.Module):
    """Two linear layers, the first one called twice, and a counter of calls."""

    def __init__(self, width: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor | None = None, use_cache: bool = False) -> Any:
        h = self.down(torch.nn.functional.gelu(self.up(x)))
        h = self.down(torch.nn.functional.gelu(self.up(h + x)))
        return {"logits": self.head(h), "hidden": (h,)}


def mlp_artifact(
    model: Mlp | None = None, weight: str = WEIGHT, activation: str = ACTIVATION
) -> Artifact:
    """Return the compiled form of an Mlp; its ``head`` is not quantized."""
    if model is None:
        torch.manual_seed(0)
        model = Mlp()
    up = PackedLinear.of("up", model.up, weight, activation)
    down = PackedLinear.of("down", model.down, weight, activation)
    tensors = {**up.tensors, **down.tensors, "calls": model.calls.clone()}
    tensors |= {"head.weight": model.head.weight.detach(), "head.bias": model.head.bias.detach()}
    head = LayerRow("head", "linear", (8, up.k), *["float32"] * 2, "aten", "skip", 1, 1, False)
    steps = [
        *up.steps("x", "u0"),
        aten("gelu.default", value("u0"), out="g0", approximate="none"),
        *down.steps("g0", "d0"),
        aten("add.Tensor", value("d0"), value("x"), out="r0"),
        *up.steps("r0", "u1"),
        aten("gelu.default", value("u1"), out="g1"),
        *down.steps("g1", "d1"),
        aten("linear.default", value("d1"), *map(value, ("head.weight", "head.bias")), out="y",
             layer="head"),
        aten("add.Tensor", value("calls"), 1, out="more"),
    ]  # fmt: skip
    outputs = {"t": "dict", "k": ["logits", "hidden"], "c": [LEAF, {"t": "tuple", "c": [LEAF]}]}
    constants = {key: key for key in tensors if key != "calls"}
    plan = Plan(
        Signature((Parameter("x", LEAF), Parameter("mask", NONE)), outputs, {"use_cache": False}),
        (Placeholder("x", "float32", ("s0", up.k)),),
        tuple(steps),
        ("y", "d1"),
        {"s0": Symbol(1, 64)},
        constants,
        {"calls": "calls"},
        (("more", "calls"),),
        (up.row(), down.row(), head),
    )
    return Artifact(plan, tensors, scheme=f"w={weight},a={activation}", pipeline="none", graph="")


def with_golden(artifact: Artifact, *calls: Tensor) -> Artifact:
    """Return the artifact with recorded calls, as the compiler records them."""
    from dataclasses import replace

    from fpcompiler.runtime.executor import Executor

    executor = Executor(artifact.plan, artifact.tensors)
    golden = tuple(Golden((x,), tuple(executor.run_leaves([x]))) for x in calls)
    return replace(artifact, golden=golden)


def expanded(linear: PackedLinear) -> Tensor:
    """Return the values of a packed weight."""
    from fpcompiler.numerics import unpack

    operand = Operand.parse(linear.weight)
    packed, *scales = [t for key, t in linear.tensors.items() if not key.endswith("bias")]
    codes = unpack(packed, operand.format.storage_bits, linear.k)
    return dequantize(codes, tuple(scales), operand)
