"""Launches recorded in a CUDA graph, and the time of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], object]


def recorded(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    """Record launches in one graph, after some have run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries of torch get their workspaces before
        for launch in launches[:3]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def seconds(graph: torch.cuda.CUDAGraph, launches: int, replays: int = 1) -> float:
    """Return the time of one launch of a graph that is replayed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / launches / replays
