"""Flags of quantizers: each thread reads what its own runs have set."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fpcompiler.errors import NumericsError
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda import capture, flags
from fpcompiler.runtime.cuda.flags import Flags, is_capturing
from fpcompiler.runtime.cuda.graphs import GraphCache, GraphOptions
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.executor import Executor
from tests.runtime.cuda.host_kernels import Kernels
from tests.runtime.cuda.test_graphs import FakeRecorder
from tests.runtime.cuda.test_kernels import ROW, artifact_of, input_of

CPU = torch.device("cpu")
OPERAND = "f6E2M3FN@token:f32"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def executor_of(folder: Path, graphs: GraphCache | None = None) -> Executor:
    problem = QuantizeProblem(Operand.parse(OPERAND), "f32", stored="f8E4M3FN")
    artifact = artifact_of(ROW, OPERAND)
    kernels = Kernels(folder, ROW, OPERAND, "sm_90a", quantizers=[problem]).open("up", "down")
    return Executor(artifact.plan, artifact.tensors, kernels=kernels, graphs=graphs)


def bad_input(rows: int) -> torch.Tensor:
    x = input_of(rows)
    x[0, 0] = torch.inf
    return x


@needs_compiler
def test_nan_of_a_thread_is_not_blamed_on_another(tmp_path: Path) -> None:
    """The other one runs from begin to end between the run and the check of the first."""
    executor = executor_of(tmp_path)
    ran, checked = threading.Event(), threading.Event()
    last = executor.plan.steps[-1]

    def waiting(step: Any, function: Any, args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if step is last:
            ran.set()
            assert checked.wait(30)
        return result

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(executor.run_leaves, [bad_input(4)], caller=waiting)
        assert ran.wait(30)
        try:
            executor.run_leaves([input_of(4)])
        finally:
            checked.set()
        with pytest.raises(NumericsError, match="layer 'up'"):
            failing.result()
        pool.submit(executor.run_leaves, [input_of(4)]).result()  # and it is forgotten


@needs_compiler
def test_what_replays_set_is_read_by_who_replays(tmp_path: Path) -> None:
    executor = executor_of(tmp_path, GraphCache(GraphOptions(), FakeRecorder()))
    good, bad = [input_of(4)], [bad_input(4)]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(executor.run_leaves, good).result()
        for _ in range(2):
            with pytest.raises(NumericsError, match="layer 'up'"):
                executor.run_leaves(bad)
            pool.submit(executor.run_leaves, good).result()
            executor.run_leaves(good)
    assert executor.graphs is not None
    assert [row.replays for row in executor.graphs.rows()] == [6]


@needs_compiler
def test_what_torch_compile_made_is_checked(tmp_path: Path) -> None:
    executor = executor_of(tmp_path)
    plain = executor.run_leaves([input_of(4)])
    torch._dynamo.reset()
    compiled = torch.compile(executor._results, backend="aot_eager")
    assert torch.equal(executor._finish(compiled([input_of(4)]))[0], plain[0])
    with pytest.raises(NumericsError, match="layer 'up'"):
        executor._finish(compiled([bad_input(4)]))
    assert torch.equal(executor._finish(compiled([input_of(4)]))[0], plain[0])


def test_threads_have_tensors_of_their_own() -> None:
    own = Flags(3, CPU)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(own.whole).result()
    here = own.whole()
    assert here is not None
    assert here is own.whole()
    assert other is not None
    assert other.data_ptr() != here.data_ptr()
    own.part(1).fill_(1)
    assert here.tolist() == [0, 1, 0]
    assert (other.tolist(), own.traced.tolist()) == ([0, 0, 0], [0, 0, 0])


def test_a_graph_has_others_than_plain_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Flags(1, CPU)
    plain = own.whole()
    recording = [True]
    monkeypatch.setattr(flags, "is_capturing", lambda device: recording[0])
    recorded = own.whole()
    assert plain is not None
    assert recorded is not None
    assert recorded is own.whole()
    assert recorded.data_ptr() != plain.data_ptr()
    recording[0] = False
    assert own.whole() is plain


def test_flags_that_somebody_elses_graph_makes_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their zeros are written by replays of that graph alone."""
    own = Flags(1, CPU)
    monkeypatch.setattr(flags, "is_capturing", lambda device: True)
    first, second = own.part(0), own.part(0)
    assert first.data_ptr() != second.data_ptr()


class FakeCuda:
    """Two GPUs; the current stream of the second one is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == 1)

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before


def test_the_stream_of_the_device_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    found = []
    for cuda.current in (0, 1):
        found.append([is_capturing(d) for d in (CPU, first, second, torch.device("cuda"))])
        assert cuda.current == len(found) - 1
    assert found == [[False, False, True, False], [False, False, True, True]]


def test_a_device_has_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if threads ask for it at the same time, and making one takes long."""
    made: list[torch.device] = []
    start = threading.Barrier(4)

    class Slow:
        def __init__(self, device: torch.device) -> None:
            threading.Event().wait(0.05)
            made.append(device)

    def ask(_: int) -> object:
        start.wait()
        return capture._lane_of(torch.device("cuda", 7))

    monkeypatch.setattr(capture, "_Lane", Slow)
    monkeypatch.setattr(capture, "_LANES", {})
    with ThreadPoolExecutor(4) as pool:
        lanes = set(pool.map(ask, range(4)))
    assert (len(lanes), len(made)) == (1, 1)
