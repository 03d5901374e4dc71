"""Finding units in a graph of a large model."""

from __future__ import annotations

import time

import pytest
import torch

from fpcompiler.reconstruction import find_units
from tests.reconstruction.graphs import Builder, aten


def deep(blocks: int, sums: bool) -> Builder:
    build = Builder()
    x = build.input()
    for number in range(blocks):
        start = x
        for layer in range(7):
            x = build.linear(f"layers.{number}.fc{layer}", x, torch.empty(1), "")
            for _ in range(37):
                x = build.call(f"layers.{number}", aten.relu.default, x)
        if sums:
            x = build.call(f"layers.{number}", aten.add.Tensor, start, x)
    build.graph.output(x)
    return build


@pytest.mark.parametrize(("sums", "units"), [(True, 72), (False, 504)], ids=["blocks", "layers"])
def test_a_large_graph_takes_no_time(sums: bool, units: int) -> None:
    build = deep(72, sums)
    start = time.process_time()
    found = find_units(build.graph, build.weights)
    # 0.1 s here; a search of the whole graph for each unit would take 23 s.
    assert time.process_time() - start < 2
    assert len(found) == units
