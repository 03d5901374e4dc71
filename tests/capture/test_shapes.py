"""Shapes of the values of a captured program in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpcompiler.capture import capture, from_exported, shapes_of_call
from tests.models import Llama, token_ids


def test_sizes_follow_from_those_of_the_inputs() -> None:
    captured = capture(Llama().eval(), (token_ids(2, 12),))
    for rows, length in ((2, 12), (3, 40)):
        found = shapes_of_call(captured, [token_ids(rows, length)])
        assert found["linear"] == (rows, length, 64)
        assert found["embedding"] == (rows, length, 64)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[1:]])


def test_sizes_may_be_expressions() -> None:
    n = torch.export.Dim("n", min=4)
    captured = capture(Twice().eval(), (torch.zeros(10, 4),), dynamic={"x": {0: n}})
    found = shapes_of_call(captured, [torch.zeros(7, 4)])
    assert found["cat"] == (13, 4)


class Mask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0] * 2


def test_sizes_that_depend_on_values_are_left_out() -> None:
    x = torch.ones(4)
    captured = from_exported(torch.export.export(Mask(), (x,)))
    found = shapes_of_call(captured, [x])
    assert found["gt"] == (4,)
    assert not any("mul" in name for name in found)
