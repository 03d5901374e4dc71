"""The trained models of this folder: the DiT, and the classifier that judges its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from examples.dit.classifier import Classifier
from examples.dit.model import DiT

HERE = Path(__file__).resolve().parent
Model = TypeVar("Model", bound=nn.Module)


def dit(folder: Path = HERE) -> DiT:
    """Return the DiT in fp32, ready to run."""
    return _filled(DiT(), folder / "dit.safetensors")


def classifier(folder: Path = HERE) -> Classifier:
    """Return the classifier in fp32, ready to run."""
    return _filled(Classifier(), folder / "classifier.safetensors")


def write(model: nn.Module, path: Path) -> None:
    """Write weights, as fp16."""
    save_file({k: v.half().contiguous().cpu() for k, v in model.state_dict().items()}, path)


def _filled(model: Model, path: Path) -> Model:
    values = load_file(path)
    floats = {k: v.float() if v.dtype == torch.float16 else v for k, v in values.items()}
    model.load_state_dict(floats)
    return model.eval().requires_grad_(False)
