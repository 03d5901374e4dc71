"""Models that are compiled and exported once for all tests of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.runtime.model import CompiledModel


class Net(nn.Module):
    """Layers with odd numbers of channels, a norm, nested arguments and named results."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(72, 64), nn.Linear(64, 33)
        self.norm, self.last = nn.LayerNorm(33), nn.Linear(33, 8)

    def forward(self, x: Tensor, extra: dict[str, Tensor] | None = None, scale: float = 1.0):
        h = torch.relu(self.first(x)) * scale
        h = self.norm(self.second(h))
        if extra is not None:
            h = h + extra["bias"]
        return {"y": self.last(h), "h": [h]}


def example(rows: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 72, generator=generator), {"bias": torch.linspace(-1, 1, 33)}


@pytest.fixture(scope="session")
def compiled() -> CompiledModel:
    """Return a model for the reference, which defines the results."""
    model = Net().eval()
    return fpcompiler.compile(model, "w4a6", example_inputs=example(), target="reference")


@pytest.fixture(scope="session")
def portable(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model as a portable ONNX file."""
    file = tmp_path_factory.mktemp("portable") / "model.onnx"
    compiled.export(file, "onnx-portable")
    return file


@pytest.fixture(scope="session")
def standard(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model as a standard ONNX file."""
    file = tmp_path_factory.mktemp("standard") / "model.onnx"
    compiled.export(file, "onnx-standard")
    return file


@pytest.fixture(scope="session")
def adding() -> CompiledModel:
    """Return a model whose layer computes an activation and adds a residual."""

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.silu(self.layer(x))

    x = example()[0][:, :64].contiguous()
    compiled = fpcompiler.compile(Adding().eval(), "w4a6", example_inputs=(x,), target="reference")
    (layer,) = (step for step in compiled.artifact.plan.steps if step.op == "fpc.linear")
    assert layer.args[8:] == ("silu", {"v": "x"})
    return compiled


@pytest.fixture(scope="session")
def tiny() -> CompiledModel:
    """Return a model that takes little time to export."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48, bias=False)).eval(), torch.randn(3, 64)
    return fpcompiler.compile(model, "w4a6", example_inputs=(x,), target="reference")
