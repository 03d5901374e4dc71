"""Layers on kernels under torch.compile, with stand-ins for kernels that compute on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.runtime.compiled_rest import own_code
from fpcompiler.runtime.cuda.graphs import GraphCache, GraphOptions
from fpcompiler.runtime.executor import Executor
from tests.runtime.cuda.host_kernels import Kernels
from tests.runtime.cuda.test_graphs import FakeRecorder
from tests.runtime.cuda.test_kernels import PROBLEMS, ROW, artifact_of, assert_near, input_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def compilable(tmp_path: Path, graphs: GraphCache | None = None) -> Executor:
    activation = "f6E2M3FN@token:f32"
    kernels = Kernels(tmp_path, ROW, activation, "sm_90a", quantizers=PROBLEMS).open("up", "down")
    artifact = artifact_of(ROW, activation)
    return Executor(artifact.plan, artifact.tensors, kernels=kernels, graphs=graphs)


def test_torch_compile_traces_kernels(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set())
    executor = compilable(tmp_path)
    targets: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    run = torch.compile(own_code(executor.run_leaves), backend=backend, fullgraph=True)
    for rows in (4, 7, 1):
        x = input_of(rows)
        assert all(map(torch.equal, executor.run_leaves([x]), run([x])))
    assert targets.count(torch.ops.fpc_cuda.quantize) == targets.count(torch.ops.fpc_cuda.gemm) > 0
    assert not {torch.ops.fpc.quantize.default, torch.ops.fpc.linear.default} & {*targets}
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nan_is_found_inside_of_a_traced_model(backend: str, tmp_path: Path) -> None:
    executor = compilable(tmp_path)
    run = torch.compile(own_code(executor.run_leaves), backend=backend, fullgraph=True)
    x = input_of(4)
    expected = executor.run_leaves([x])
    bad = x.clone()
    bad[2, 1] = torch.nan
    for _ in range(2):
        assert_near(expected, run([x]))
        with pytest.raises(NumericsError, match="layer 'up': input holds NaN"):
            run([bad])
    assert_near(expected, run([x]))


def test_what_torch_compile_made_is_recorded_and_its_steps_are_watched(tmp_path: Path) -> None:
    recorder = FakeRecorder()
    executor = compilable(tmp_path, GraphCache(GraphOptions(), recorder))
    plain = executor.fresh()
    plain.graphs = None
    executor.compile_rest()
    assert executor.graphs is not None
    for _ in range(4):
        assert_near(plain.run_leaves([input_of(4)]), executor.run_leaves([input_of(4)]))
    (row,) = executor.graphs.rows()
    assert (row.recorded, row.replays) == (True, 2)
    assert recorder.recorded == executor._compiled
    assert recorder.watched == executor._results
    x = input_of(4)
    x[2, 1] = torch.nan
    with pytest.raises(NumericsError, match="up"):
        executor.run_leaves([x])
