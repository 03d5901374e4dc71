"""Rounding of activations within a graph that is differentiated."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.operand import Operand
from fpcompiler.reconstruction import fake_quantize
from tests.models import normal
from tests.reconstruction.graphs import (
    ACTIVATION,
)


def test_fake_quantize_rounds_and_passes_the_gradient() -> None:
    x = normal(6, 32).requires_grad_()
    wanted = normal(6, 32, seed=1)
    operand = Operand.parse(ACTIVATION)
    codes, scales = quantize(x.detach(), operand)
    for given in ([], list(scales)):
        value = fake_quantize(x, ACTIVATION, given, "layer")
        assert torch.equal(value, dequantize(codes, scales, operand))
        (gradient,) = torch.autograd.grad((value * wanted).sum(), x)
        assert torch.equal(gradient, wanted)
    half = fake_quantize(x.detach().half(), ACTIVATION, [], "layer")
    assert half.dtype == torch.float16
    with pytest.raises(NumericsError, match="layer 'one'"):
        fake_quantize(torch.full((1, 4), torch.nan), ACTIVATION, [], "one")
