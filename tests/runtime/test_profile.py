"""Measuring: what is timed, summed, counted and shown."""

import json
import math
import mmap
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from fpcompiler.errors import OptionError, RunError
from fpcompiler.native.linear import Arithmetic
from fpcompiler.plan import Parameter, Placeholder, Plan, Signature, Step
from fpcompiler.runtime import ceilings, memory, roofline
from fpcompiler.runtime.ceilings import Ceilings, measure_ceilings
from fpcompiler.runtime.clocks import clock_of
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.profile import WARM_UP_CALLS, profile
from fpcompiler.runtime.profile_report import Latency
from fpcompiler.runtime.timeline import GROUPS, TRACED_CALLS, Timeline, layer_kind, step_groups
from fpcompiler.tree import LEAF
from tests.plans import Mlp, PackedLinear, aten, mlp_artifact, value, with_golden

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
MACHINE = Ceilings("native", 1, 1e9, 1 << 20, 2e9, {"int8": 4e9, "bf16": 2e9, "float32": 1e9})


@pytest.fixture(scope="module")
def model():
    return CompiledModel(with_golden(mlp_artifact(), X))


@pytest.fixture(scope="module")
def result(model):
    return model.profile(iterations=12)


def test_the_caller_runs_every_step_in_order(model):
    executor = Executor(model.artifact.plan, model.artifact.tensors)
    seen = []

    def caller(step, function, args, kwargs):
        seen.append(step)
        return function(*args, **kwargs)

    outputs = executor.run_leaves([X], caller=caller)
    assert tuple(seen) == executor.plan.steps
    assert all(map(torch.equal, outputs, executor.fresh().run_leaves([X])))


def test_as_many_calls_are_timed_as_were_asked_for(result):
    latency = result.latency
    assert latency.calls == 12
    assert len(result.timeline.calls) <= 12
    assert 0 < latency.min <= latency.p50 <= latency.p90 <= latency.p99
    assert latency.min <= latency.mean
    assert result.items_per_second == 5 / latency.p50
    assert result.inputs == ("x float32 [5, 64]",)
    assert result.first_call > 0


def test_percentiles_lie_between_the_calls():
    latency = Latency.of([float(n) for n in range(101)])
    expected = (101, 0.0, 50.0, 50.0, 90.0, 99.0)
    found = (latency.calls, latency.min, latency.mean, latency.p50, latency.p90, latency.p99)
    assert found == pytest.approx(expected)


def test_items_and_tokens_are_counted_from_the_first_input(result):
    assert (result.counted.items, result.counted.tokens) == (5, None)
    assert result.tokens_per_second is None
    plan = Plan(
        Signature((Parameter("ids", LEAF),), LEAF),
        (Placeholder("ids", "int64", (2, 3)),),
        (aten("add.Tensor", value("ids"), 1, out="y"),),
        ("y",),
    )
    ids = torch.zeros(2, 3, dtype=torch.int64)
    counted = profile(Executor(plan, {}), [ids], iterations=1)
    assert (counted.counted.items, counted.counted.tokens) == (2, 6)
    assert counted.tokens_per_second == 6 / counted.latency.p50
    assert counted.roofline == ()
    assert "a token is one id of 'ids': 2 x 3 a call" in str(counted)
    assert "roofline" not in str(counted)


def test_shares_of_the_operators_make_up_the_call(result):
    assert sum(row.share for row in result.rows) == pytest.approx(1)
    total = result.timeline.call_seconds()
    assert sum(row.seconds for row in result.rows) == pytest.approx(total)
    groups = result.group_seconds()
    assert sum(seconds for _, seconds in groups.values()) == pytest.approx(total)
    assert {group: steps for group, (steps, _) in groups.items()} == {
        "quantized GEMM": 4,
        "quantize": 4,
        "float GEMM": 1,
        "other operators": 4,
        "interpreter": 1,
    }
    assert all(row.seconds > 0 for row in result.rows)
    calls = {(row.operator, row.layers): row.calls for row in result.rows}
    assert calls["fpc.linear", "up"] == 2
    assert calls["aten.gelu.default", ""] == 2


def test_interpreter_time_is_what_is_in_no_step():
    steps = (aten("neg.default", value("x"), out="a"), aten("neg.default", value("a"), out="b"))
    # Two calls of 10 and one of 100 that was disturbed; steps of 3 and 5 in each of the two.
    calls = torch.tensor([[0, 10], [20, 120], [130, 140]], dtype=torch.float64)
    spans = torch.tensor(
        [[[1, 4], [4, 9]], [[21, 60], [60, 119]], [[131, 134], [135, 140]]], dtype=torch.float64
    )
    timeline = Timeline(steps, ("torch", "native"), calls, spans)
    assert (timeline.call_seconds(), timeline.median_call()) == (10, 10)
    parts = {"native": 0.5, "torch": 0.3, "between_steps": 0.2}
    assert asdict(timeline.split()) == pytest.approx(parts)
    assert timeline.step_seconds() == [3, 5]
    rows = timeline.rows({"a": "other operators", "b": "other operators"})
    assert [(row.group, row.kernel, row.calls, row.seconds, row.share) for row in rows] == [
        ("other operators", "native", 1, 5, 0.5),
        ("other operators", "torch", 1, 3, 0.3),
        ("interpreter", "", 1, 2, 0.2),
    ]


def test_the_trace_is_what_a_browser_reads(result):
    trace = json.loads(json.dumps(result.trace()))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    calls = [event for event in events if event["cat"] == "call"]
    steps = [event for event in events if event["cat"] != "call"]
    timed = min(len(result.timeline.calls), TRACED_CALLS)
    assert len(calls) == timed
    assert len(steps) == timed * len(result.timeline.steps)
    assert {event["cat"] for event in steps} <= {*GROUPS}
    assert all(event["dur"] >= 0 for event in events)
    assert all(event["pid"] == 1 and event["tid"] == 1 for event in events)
    slack = 1e-2  # A microsecond number has three decimals.
    for call in calls:
        end = call["ts"] + call["dur"]
        inside = [event for event in steps if call["ts"] - slack <= event["ts"] < end]
        assert len(inside) == len(result.timeline.steps)
        assert all(event["ts"] + event["dur"] <= end + slack for event in inside)
        assert all(a["ts"] + a["dur"] <= b["ts"] + slack for a, b in pairwise(inside))
        assert sum(event["dur"] for event in inside) <= call["dur"] + slack
    layers = {event["args"]["layer"] for event in steps if event["name"] == "fpc.linear"}
    assert layers == {"up", "down"}


def test_state_is_reset_before_each_call_and_the_model_keeps_its_own(model):
    executor = Executor(model.artifact.plan, model.artifact.tensors)
    executor.run_leaves([X])
    before = executor._state["calls"].clone()
    seen = []
    original = Executor.run_leaves

    def spy(self, leaves, *args, **kwargs):
        seen.append(self._state["calls"].item())
        return original(self, leaves, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "run_leaves", spy)
        found = profile(executor, [X], iterations=3)
    assert len(seen) >= 1 + WARM_UP_CALLS + 3 + 1 + len(found.timeline.calls)
    assert {*seen} == {0.0}
    assert torch.equal(executor._state["calls"], before)
    assert found.state == 1
    assert "1 tensor, reset before each call" in str(found)


def test_bytes_and_operations_of_a_layer_are_those_of_its_tensors():
    linear = torch.nn.Linear(96, 40)
    packed = PackedLinear.of("deep.7.fc", linear)
    plan = Plan(
        Signature((Parameter("x", LEAF),), LEAF),
        (Placeholder("x", "float32", (2, 3, 96)),),
        tuple(packed.steps("x", "y")),
        ("y",),
        constants={key: key for key in packed.tensors},
    )
    (call,) = roofline.linear_calls(Executor(plan, packed.tensors), [torch.randn(2, 3, 96)])
    assert (call.m, call.n, call.k, call.layer) == (6, 40, 96, "deep.7.fc")
    # Codes of 4 bits, an fp32 scale a row, a byte for 32 values, an fp32 bias.
    assert call.weight_bytes == 40 * 96 // 2 + 40 * 4 + 40 * 3 + 40 * 4
    assert call.weight_bytes == sum(tensor.nbytes for tensor in packed.tensors.values())
    # Codes of a byte, and a byte for 32 values.
    assert call.activation_bytes == 6 * 96 + 6 * 3
    assert call.bytes_read == call.weight_bytes + call.activation_bytes
    assert call.operations == 2 * 6 * 40 * 96
    assert call.arithmetic is Arithmetic.INT8
    steps = packed.steps("x", "y")
    adding = replace(steps[-1], args=(*steps[-1].args, "", {"v": "r"}))
    signature = Signature((Parameter("x", LEAF), Parameter("r", LEAF)), LEAF)
    inputs = (*plan.placeholders, Placeholder("r", "float32", (2, 3, 40)))
    other = replace(plan, signature=signature, placeholders=inputs, steps=(*steps[:-1], adding))
    leaves = [torch.randn(2, 3, 96), torch.randn(2, 3, 40)]
    (more,) = roofline.linear_calls(Executor(other, packed.tensors), leaves)
    assert more.bytes_read == call.bytes_read + 2 * 3 * 40 * 4


@pytest.mark.parametrize(
    ("operand", "n", "k"),
    [
        ("f4E2M1FN@tensor:f32/block16:f8E4M3FN", 7, 40),
        ("f6E2M3FN@block32:f8E8M0FNU", 5, 33),
        ("f8E4M3FN@row:f32", 3, 10),
    ],
)
def test_packed_weights_are_as_large_as_they_are_stored(operand, n, k):
    packed = PackedLinear.of("fc", torch.nn.Linear(k, n, bias=False), operand)
    stored = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert roofline.packed_weight_bytes(roofline.Operand.parse(operand), n, k) == stored


@pytest.mark.parametrize(
    ("read", "operations", "bound", "limit"), [(8e6, 1, 4e-3, "memory"), (1, 8e6, 2e-3, "int8")]
)
def test_the_bound_is_the_longer_of_reading_and_computing(read, operations, bound, limit):
    m, k = (1, 1) if operations == 1 else (2000, 1000)
    n = 1 if operations == 1 else 2
    call = roofline.LinearCall("y", "fc", m, n, k, Arithmetic.INT8, int(read), 0)
    (row,) = roofline.roofline([call], [8e-3], MACHINE)
    assert row.bound_seconds == pytest.approx(bound)
    assert row.limit == limit
    assert row.fraction == pytest.approx(bound / 8e-3)
    assert row.to_json()["arithmetic"] == "int8"


def test_the_roofline_has_each_call_of_a_quantized_layer(result):
    assert [row.call.layer for row in result.roofline] == ["up", "down", "up", "down"]
    assert all(0 < row.fraction < 1 for row in result.roofline)
    read = sum(row.call.bytes_read for row in result.roofline)
    assert result.ceilings.set_bytes == max(read, ceilings.NEAR_BYTES)


def test_ceilings_come_from_the_native_library_or_from_torch(monkeypatch):
    monkeypatch.setattr(ceilings, "FAR_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "_SIZE", {"cpu": 64})
    monkeypatch.setattr(ceilings.native, "library", lambda: None)
    found = measure_ceilings(torch.device("cpu"), 10)
    assert found.source == "torch"
    assert {*found.peaks} == {"int8", "bf16", "float32"}
    rates = [found.memory, found.set_read, *found.peaks.values()]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


def test_ceilings_of_the_native_library(result):
    if ceilings.native.library() is None:
        pytest.skip("the native library was not built")
    found = result.ceilings
    assert (found.source, found.threads) == ("native", torch.get_num_threads())
    assert min(found.memory, found.set_read) > 1e8
    assert found.peaks["int8"] > 0.5 * found.peaks["float32"] > 1e8


def test_products_are_attention_unless_a_weight_is_in_them():
    steps = (
        aten("t.default", value("w"), out="wt"),
        aten("mm.default", value("x"), value("wt"), out="a"),
        aten("bmm.default", value("a"), value("x"), out="b"),
        aten("_softmax.default", value("b"), -1, False, out="c"),
        aten("scaled_dot_product_attention.default", *3 * [value("c")], out="d"),
        Step("fpc.hadamard", (value("d"), 32), ("e",)),
        Step("py.mul", (2, 3), ("f",)),
    )
    plan = Plan(
        Signature((Parameter("x", LEAF),), LEAF), (Placeholder("x", "float32", (1, 3, 3)),), steps,
        ("e",), constants={"w": "w"},
    )  # fmt: skip
    expected = "other operators", "float GEMM", *3 * ["attention"], "quantize", "other operators"
    assert tuple(step_groups(plan).values()) == expected


def test_layers_of_all_blocks_are_of_one_kind():
    assert layer_kind("model.layers.12.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    assert layer_kind("0.norm2.3") == "*.norm2.*"


def test_memory_grows_by_what_is_touched():
    meter = memory.MemoryMeter(torch.device("cpu"))
    if memory.resident_bytes() is None:
        pytest.skip("the system does not tell")
    size = 64 << 20
    # Memory from the system itself: an allocator may have some left that is resident already.
    with mmap.mmap(-1, size) as fresh:
        fresh.write(bytes(size))
        found = meter.read()
    assert found.growth >= 0.9 * size if found.peak_of_calls else found.growth >= 0
    assert found.device_peak is None


def test_a_system_that_does_not_tell_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    found = memory.MemoryMeter(torch.device("cpu")).read()
    assert found == memory.Memory(None, None, None, False)
    assert found.growth is None


def test_json_and_text_say_the_same(result):
    data = json.loads(json.dumps(result.to_json()))
    assert data["latency"]["p50"] == result.latency.p50
    assert [row["layer"] for row in data["roofline"]] == ["up", "down", "up", "down"]
    assert data["timed_calls"]["calls"] == len(result.timeline.calls)
    assert sum(group["share"] for group in data["groups"]) == pytest.approx(1)
    text = str(result)
    assert "time by operator" in text
    assert "5 x 96 x 64" in text
    assert data["program"] is False
    assert data["split"] == asdict(result.timeline.split())
    assert "0.0% in native kernels (0 steps)" in text
    assert "; steps run one by one" in text
    shown = result.tables(top=1)
    assert len(shown) == 4


def test_a_call_can_be_given(model):
    assert model.profile(torch.randn(9, 64), iterations=1).counted.items == 9
    assert model.profile({"x": X}, seconds=0.01).latency.calls >= 3
    assert model.profile(sizes={"s0": 7}, iterations=1).inputs == ("x float32 [7, 64]",)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seconds": 0.0}, OptionError, "time to measure must be positive, not 0.0 seconds"),
        ({"seconds": math.inf}, OptionError, "must be positive, not inf"),
        ({"iterations": 0}, OptionError, "At least one call must be measured, not 0"),
        ({"batch": X, "sizes": {"s0": 1}}, OptionError, "leave them out beside a batch"),
        ({"batch": torch.ones(5, 63)}, RunError, "'x': expected the shape"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.profile(**arguments)


def test_a_model_that_is_not_compiled_yet_says_so():
    with pytest.raises(RunError, match="captured by its first call"):
        CompiledModel.deferred(lambda args, kwargs: mlp_artifact(Mlp())).profile()


@pytest.mark.gpu
def test_cuda_events_time_the_device(model):
    executor = Executor(model.artifact.plan, model.artifact.tensors, "cuda")
    found = profile(executor, [X.cuda()], iterations=5)
    assert 0 < found.latency.min < 10
    assert (found.timeline.spans[..., 1] >= found.timeline.spans[..., 0]).all()
    assert found.memory.device_peak > 0
    assert found.ceilings.source == "torch"


def test_the_clock_of_the_host_goes_forward():
    clock = clock_of(torch.device("cpu"))
    first, second = clock.mark(), clock.mark()
    clock.wait()
    assert clock.seconds(first, second) >= 0
    assert clock.seconds(second, first) == -clock.seconds(first, second)
