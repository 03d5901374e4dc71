"""Models, data and steps that the tests of ``preshift`` share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fpcompiler import ir, passes
from fpcompiler.calibration import Calibration
from fpcompiler.calibration.float_graph import raise_without_quantization
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.numerics.powers import exact_power
from tests.models import LlamaBlock, normal
from tests.passes.tiny import Attention, tiny
from tests.programs import quantized

ROW = "w=f4E2M1FN@row:f32,a=f6E2M3FN@token:f32,skip=none"
TENSOR = "w=f4E2M1FN@row:f32,a=f4E2M1FN@tensor:f32,skip=none"
BLOCK = "w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=f4E2M1FN@token:f32,skip=none"


class Bert(nn.Module):
    """A feed-forward block whose norm comes last: the next block and the residual both read it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.down(self.act(self.up(y)))


class Conv(nn.Module):
    """A convolution, whose channels are those of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def uneven(kind: type[nn.Module]) -> nn.Module:
    """Return a model whose norms and inner channels differ in range."""
    model = tiny(kind)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or "up" in name:
                rows = exact_power(torch.arange(len(value)) % 6 - 3)
                value.mul_(rows.view(-1, *[1] * (value.ndim - 1)))
    return model


def images(seed: int) -> Tensor:
    return normal(2, 4, 6, 6, seed=seed) * exact_power(torch.arange(4))[:, None, None]


MODELS = {
    "llama": (lambda: uneven(LlamaBlock), lambda seed: normal(2, 8, 64, seed=seed)),
    "attention": (lambda: uneven(Attention), lambda seed: normal(2, 8, 32, seed=seed)),
    "bert": (lambda: uneven(Bert), lambda seed: normal(2, 8, 32, seed=seed)),
    "conv": (lambda: tiny(Conv), images),
}


@functools.cache
def _captured(name: str, scheme: str) -> ir.Program:
    make, data = MODELS[name]
    return quantized(make(), data(0), scheme=scheme)


def program_of(name: str, scheme: str = ROW) -> ir.Program:
    """Return a model of the table at stage quantized; each is captured once."""
    return _captured(name, scheme).clone()


def run(program: ir.Program, text: str, *batches: Tensor) -> tuple[passes.PassResult, ...]:
    """Run passes with calibration data."""
    calibration = Calibration([(batch,) for batch in batches], device=torch.device("cpu"))
    return passes.run_pipeline(program, passes.parse_pipeline(text), calibration=calibration)


def without_quantization(program: ir.Program, x: Tensor) -> Tensor:
    module, _ = raise_without_quantization(program, [])
    with torch.no_grad():
        (result,) = module(x)
    return result


def notes(program: ir.Program) -> dict[str, str]:
    return {
        text_of(op.attributes["layer"]): text_of(op.attributes["fpq.note"])
        for op in program.operations("fpq.linear")
    }


class Product(nn.Module):
    """One layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def uneven_input(tokens: int, k: int, seed: int = 0) -> Tensor:
    return normal(tokens, k, seed=seed) * exact_power(-(torch.arange(k) * 7 % 5))
