"""Which calls are recorded and replayed, with a recorder that has functions in place of graphs."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.plan import Parameter, Placeholder, Plan, Signature
from fpcompiler.runtime.cuda.capture import Watch
from fpcompiler.runtime.cuda.graphs import GraphCache, GraphOptions, Replay, Run
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.tree import LEAF
from tests.plans import Mlp, aten, mlp_artifact, value

MEMORY = 800


class FakeReplay:
    """Has tensors of its own, as a graph has, and runs the function on them."""

    nbytes = 10

    def __init__(self, leaves: Sequence[Tensor], run: Run) -> None:
        self.inputs, self.run = [leaf.clone() for leaf in leaves], run
        self.results: list[Any] | None = None

    def __call__(self, leaves: Sequence[Tensor]) -> list[Any]:
        for own, leaf in zip(self.inputs, leaves, strict=True):
            own.copy_(leaf)
        found = self.run(self.inputs)
        if self.results is None:
            self.results = found
        for own, new in zip(self.results, found, strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)
        return list(self.results)


class FakeRecorder:
    """Notes what it is asked for."""

    memory = MEMORY

    def __init__(self) -> None:
        self.log: list[str] = []
        self.watched: Run | None = None
        self.recorded: Run | None = None
        self.is_busy, self.reason, self.failure, self.setting = False, "", "", 0
        self.lock = threading.Lock()

    def busy(self) -> bool:
        return self.is_busy

    def settings(self) -> int:
        return self.setting

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self.lock:
            yield

    def warm_up(self, leaves: Sequence[Tensor], run: Run, steps: Run) -> tuple[list[Any], str]:
        assert self.lock.locked()
        self.log.append("warm up")
        self.watched = steps
        return run(leaves), self.reason

    def record(self, leaves: Sequence[Tensor], run: Run) -> Replay | str:
        assert self.lock.locked()
        self.log.append("record")
        self.recorded = run
        return self.failure or FakeReplay(leaves, run)

    def settle(self) -> None:
        self.log.append("settle")

    def renew(self) -> None:
        self.log.append("renew")

    def fresh(self) -> FakeRecorder:
        return FakeRecorder()


class Calls:
    """A cache, and calls of it that double their input."""

    def __init__(self, **options: Any) -> None:
        self.recorder = FakeRecorder()
        self.cache = GraphCache(GraphOptions(**options), self.recorder)
        self.runs = 0
        self.fails = False

    def __call__(self, size: int, fill: float = 1.0) -> Tensor:
        (found,) = self.cache.run([torch.full((size,), fill)], self._run, self._finish, self._run)
        assert torch.equal(found, torch.full((size,), 2 * fill))
        return found

    def _run(self, leaves: Sequence[Tensor]) -> list[Any]:
        self.runs += 1
        return [leaves[0] * 2]

    def _finish(self, results: list[Any]) -> list[Any]:
        if self.fails:
            raise NumericsError("layer 'up': input holds NaN")
        return results

    @property
    def recorded(self) -> list[int]:
        return [row.sizes[0][0] for row in self.cache.rows() if row.recorded]

    def made(self) -> int:
        return self.recorder.log.count("record")


def test_the_second_call_is_recorded_and_the_third_replayed() -> None:
    calls = Calls()
    calls(3)
    assert calls.recorder.log == []
    calls(3)
    assert calls.recorder.log == ["warm up", "record"]
    assert [row.replays for row in calls.cache.rows()] == [0]
    calls(3, 5.0)
    (row,) = calls.cache.rows()
    assert (row.sizes, row.calls, row.replays, row.recorded) == (((3,),), 3, 1, True)
    assert str(row) == "[3]: a graph of 10 bytes, replayed 1 times"


def test_sizes_that_do_not_come_back_are_not_recorded() -> None:
    calls = Calls()
    for size in range(1, 600):
        calls(size)
    assert calls.made() == 0
    assert len(calls.cache.rows()) == 256
    assert str(calls.cache.rows()[-1]) == "[599]: step by step; 1 calls"


def test_outputs_are_copies_unless_the_user_wants_none() -> None:
    for copies in (True, False):
        calls = Calls(copies=copies)
        for _ in range(2):
            calls(3)
        first, second = calls(3, 1.0), calls(3, 2.0)
        assert (first.data_ptr() != second.data_ptr()) == copies
        assert bool((first == 2).all()) == copies


def test_the_one_not_used_for_longest_goes() -> None:
    calls = Calls(most=2)
    for size in (1, 1, 2, 2, 1, 3, 3):
        calls(size)
    assert calls.recorded == [1, 3]
    assert calls.recorder.log[-1] == "settle"
    # It needs twice as many calls now.
    for _ in range(3):
        calls(2)
    assert calls.recorded == [1, 3]
    calls(2)
    assert calls.recorded == [3, 2]


def test_sizes_that_take_turns_are_recorded_ever_more_rarely() -> None:
    calls = Calls(most=2)
    for _ in range(100):
        for size in (1, 2, 3):
            calls(size)
    assert calls.made() < 30


def test_graphs_take_a_part_of_the_memory() -> None:
    calls = Calls(share=25 / MEMORY)
    for size in (1, 1, 2, 2):
        calls(size)
    assert calls.recorded == [1, 2]
    for _ in range(2):
        calls(3)
    assert calls.recorded == []
    assert calls.recorder.log[-2:] == ["settle", "renew"]
    assert not any(row.reason for row in calls.cache.rows())
    for _ in range(4):
        calls(1)
    assert calls.recorded == [1]


def test_one_that_is_larger_than_that_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    calls = Calls(share=9 / MEMORY)
    for _ in range(5):
        calls(1)
    assert calls.made() == 1
    (row,) = calls.cache.rows()
    assert str(row) == "[1]: step by step; its graph needs 10 bytes, and graphs may take 9"
    assert "calls with [1] run step by step" in caplog.text


@pytest.mark.parametrize(("place", "made"), [("reason", 0), ("failure", 1)])
def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(
    caplog: pytest.LogCaptureFixture, place: str, made: int
) -> None:
    calls = Calls()
    setattr(calls.recorder, place, "aten::nonzero waits")
    with caplog.at_level(logging.WARNING, "fpcompiler.runtime"):
        for _ in range(5):
            calls(2)
    assert (calls.made(), calls.recorder.log.count("warm up"), calls.runs) == (made, 1, 5)
    assert len(caplog.records) == 1
    assert "aten::nonzero waits" in caplog.text
    setattr(calls.recorder, place, "")
    for _ in range(3):
        calls(3)
    assert calls.recorded == [3]


def test_an_error_of_the_values_leaves_the_cache_as_it_was() -> None:
    calls = Calls()
    calls(2)
    calls.fails = True
    with pytest.raises(NumericsError):
        calls(2)
    assert calls.recorded == []
    calls.fails = False
    calls(2)
    assert calls.recorded == [2]
    calls.fails = True
    with pytest.raises(NumericsError):
        calls(2)
    calls.fails = False
    calls(2, 7.0)
    assert calls.made() == 1


def test_calls_within_another_capture_and_empty_ones_run_plainly() -> None:
    calls = Calls()
    calls.recorder.is_busy = True
    for _ in range(3):
        calls(2)
    calls.recorder.is_busy = False
    for _ in range(3):
        calls(0)
    assert calls.cache.rows() == ()


def test_settings_have_graphs_of_their_own() -> None:
    calls = Calls()
    for setting in (0, 1, 0, 1, 0):
        calls.recorder.setting = setting
        calls(2)
    assert calls.recorded == [2, 2]
    assert [row.replays for row in calls.cache.rows()] == [0, 1]


def test_threads_do_not_get_results_of_others() -> None:
    calls = Calls(most=2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: calls(1 + i % 3, float(i)), range(300)))


def test_a_fresh_cache_has_no_graphs() -> None:
    calls = Calls(most=3)
    for _ in range(2):
        calls(2)
    assert calls.cache.fresh().rows() == ()


@pytest.mark.parametrize("options", [{"most": 0}, {"share": 0.0}, {"share": 1.5}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="most must be at least 1"):
        GraphOptions(**options)


def counting_plan() -> Plan:
    """Return a program that writes a row of one state in place, and adds to another at its end."""
    return Plan(
        signature=Signature((Parameter("x", LEAF), Parameter("index", LEAF)), LEAF),
        placeholders=(Placeholder("x", "float32", (1, 3)), Placeholder("index", "int64", (1,))),
        steps=(
            aten("index_copy.default", value("rows"), 0, value("index"), value("x"), out="new"),
            aten("add.Tensor", value("sum"), value("x"), out="more"),
            aten("add.Tensor", value("new"), value("more"), out="y"),
        ),
        outputs=("y",),
        state={"rows": "rows", "sum": "sum"},
        stores=(("new", "rows"), ("more", "sum")),
    )


def test_the_state_goes_on_as_without_graphs() -> None:
    tensors = {"rows": torch.zeros(4, 3), "sum": torch.zeros(1, 3)}
    plain = Executor(counting_plan(), tensors)
    graphs = GraphCache(GraphOptions(), FakeRecorder())
    replaying = Executor(counting_plan(), tensors, graphs=graphs)
    for executors in ((plain, replaying), (plain.fresh(), replaying.fresh())):
        for step in range(9):
            x, index = torch.full((1, 3), float(step)), torch.tensor([step % 4])
            assert torch.equal(*(executor.run(x, index) for executor in executors))
            if step == 6:
                for executor in executors:
                    executor.reset()
        cache = executors[1].graphs
        assert cache is not None
        assert [row.replays for row in cache.rows()] == [7]
    assert cache is not graphs


def test_observed_calls_run_step_by_step() -> None:
    tensors = {"rows": torch.zeros(4, 3), "sum": torch.zeros(1, 3)}
    executor = Executor(counting_plan(), tensors, graphs=GraphCache(GraphOptions(), FakeRecorder()))
    for _ in range(4):
        executor.observed(lambda step, result: None, torch.ones(1, 3), torch.tensor([0]))
    assert executor.graphs is not None
    assert executor.graphs.rows() == ()


def test_graphs_are_for_gpus(tmp_path: Any) -> None:
    model = CompiledModel(mlp_artifact(Mlp()))
    assert model.graphs == ()
    model.save(tmp_path / "model.fpc")
    for graphs in (True, GraphOptions()):
        with pytest.raises(OptionError, match="only CUDA devices have graphs"):
            load(tmp_path / "model.fpc", graphs=graphs)
    assert load(tmp_path / "model.fpc", graphs=False).graphs == ()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: x.nonzero(), "the result or the size of aten::nonzero depends on values"),
        (lambda x: x.sum().item(), "of aten::_local_scalar_dense depends on values"),
        (lambda x: x[x > 0], "the size of what aten::index.Tensor reads depends on a mask"),
        (lambda x: x.index_put([x > 0], x.new_ones(())), "depends on a mask"),
        (lambda x: x.to("meta"), "copies between the CPU and the GPU"),
        (
            lambda x: torch.ops.fpc.quantize(x, "f6E2M3FN@token:f32", "up"),
            "fpc::quantize has no kernel for this GPU",
        ),
        (lambda x: x[torch.tensor([0, 1])] @ x.T, ""),
        (lambda x: torch.where(x > 0, x, 0).to(torch.bfloat16).softmax(-1), ""),
        (lambda x: x.index_copy(0, torch.tensor([1]), x[:1]), ""),
    ],
)
def test_operators_that_wait_are_seen_before_anything_is_captured(call: Any, reason: str) -> None:
    with Watch() as watch:
        call(torch.linspace(-1, 1, 12).reshape(3, 4))
    assert (reason in watch.reason) if reason else watch.reason == ""
