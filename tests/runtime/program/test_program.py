"""Programs: what they compute is what the steps compute, bit for bit, call after call."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import NumericsError, RunError
from fpcompiler.native import library
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.inputs import bind
from fpcompiler.runtime.program.run import Program, Segment, TorchStep
from tests.models import cases, normal, token_ids

pytestmark = pytest.mark.skipif(library() is None, reason="needs the native library")

QUICK = ("llama", "vit", "dit", "cached", "shared", "decoder-llama")


def executors(
    model: nn.Module, args: Any, kwargs: Any, **options: Any
) -> tuple[Executor, Executor]:
    """Return two executors of a model: one makes programs, the other runs its steps."""
    compiled = fpcompiler.compile(
        model, options.pop("scheme", "w4a6"), example_inputs=args, example_kwargs=kwargs, **options
    )
    artifact = compiled.artifact
    first, second = (Executor(artifact.plan, artifact.tensors) for _ in range(2))
    second._programs = None
    return first, second


def varied(leaf: Tensor, number: int) -> Tensor:
    """Return other values of the same form: a program must not remember those it saw."""
    if leaf.is_floating_point():
        return leaf * (1 - 0.125 * number)
    return leaf.roll(number, -1) if leaf.ndim else leaf


def programs_of(executor: Executor) -> list[Program]:
    assert executor._programs is not None
    return [found for found in executor._programs._found.values() if found is not None]


def require_equal(first: Executor, second: Executor, leaves: list[Tensor], times: int = 4) -> None:
    """Call both several times: step by step, recorded, and as a program from the third time on."""
    for number in range(times):
        own = [varied(leaf, number) for leaf in leaves]
        results = zip(first.run_leaves(own), second.run_leaves(own), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in results)
        states = zip(first._state.values(), second._state.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in cases()]
)
def test_models_as_programs(name: str) -> None:
    case = cases()[name]
    model, args, kwargs = case.make()
    first, second = executors(model, args, kwargs)
    calls = [(args, kwargs), *case.other_inputs()]
    for call in calls:
        require_equal(first, second, bind(first.plan.signature, *call))
    assert programs_of(first)
    assert all(any(isinstance(i, Segment) for i in p.items) for p in programs_of(first))


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4", "nvfp4", "w4a6-row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schemes_and_types(scheme: str, dtype: torch.dtype) -> None:
    model, args, kwargs = cases()["llama"].make()
    first, second = executors(model.to(dtype), args, kwargs, scheme=scheme)
    require_equal(first, second, bind(first.plan.signature, args, kwargs))
    assert programs_of(first)


def by_torch(executor: Executor) -> set[str]:
    """Return the operators that torch runs in the programs of an executor."""
    items = [item for program in programs_of(executor) for item in program.items]
    return {item.instruction.step.op for item in items if isinstance(item, TorchStep)}


def test_layers_whose_inputs_are_not_quantized() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    first, second = executors(model.eval(), (normal(3, 64),), {}, scheme="w4a16")
    require_equal(first, second, [normal(3, 64)])
    assert by_torch(first) == {"aten.tanh.default"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a6"])
def test_layers_that_compute_their_activation(scheme: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Tanh(), nn.Linear(96, 32), nn.GELU())
    x = normal(3, 64).to(dtype)
    first, second = executors(model.eval().to(dtype), (x,), {}, scheme=scheme)
    require_equal(first, second, [x])
    assert [s.args[8] for s in first.plan.steps if s.op == "fpc.linear"] == ["silu", "gelu"]
    assert by_torch(first) == {"aten.tanh.default"}


class Residuals(nn.Module):
    """A residual without gaps, one with, and one that is read again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, wide: Tensor) -> Tensor:
        x = x + self.layers[0](x)
        y = self.layers[1](x) + wide[..., ::2]
        z: Tensor = (y + nn.functional.silu(self.layers[2](y))) * y
        return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a6", "w4a6-row"])
def test_layers_that_add_a_residual(scheme: str, dtype: torch.dtype) -> None:
    inputs = normal(3, 5, 64, seed=1).to(dtype), normal(3, 5, 128, seed=2).to(dtype)
    first, second = executors(Residuals().eval().to(dtype), inputs, {}, scheme=scheme)
    require_equal(first, second, list(inputs))
    assert [len(s.args) for s in first.plan.steps if s.op == "fpc.linear"] == [10] * 3
    assert not {"fpc.linear", "aten.add.Tensor"} & by_torch(first)
    assert programs_of(first)


def test_inputs_whose_scales_are_given() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).eval()
    first, second = executors(
        model, (normal(3, 64),), {}, scheme="w=f4E2M1FN@row:f32,a=f6E2M3FN@tensor:f32",
        method="search", calibration=[(normal(16, 64, seed=i),) for i in range(3)],
    )  # fmt: skip
    assert any(step.op == "fpc.encode" for step in first.plan.steps)
    require_equal(first, second, [normal(3, 64)])
    assert "fpc.linear" not in by_torch(first)


def decoder() -> tuple[Executor, Executor]:
    model, args, kwargs = cases()["decoder-llama"].make()
    return executors(model, args, kwargs)


def test_a_token_of_a_decoder_is_few_pieces() -> None:
    first, _ = decoder()
    for position in range(3):
        first.run(token_ids(2, 1), torch.tensor([position]))
    (program,) = programs_of(first)
    kinds = [i.instruction.step.op for i in program.items if isinstance(i, TorchStep)]
    assert not {"aten.index_copy.default", "aten.add.Tensor", "fpc.linear"} & set(kinds)
    assert "aten.scaled_dot_product_attention.default" not in kinds


def test_the_cache_is_written_in_place() -> None:
    first, _ = decoder()
    where = {name: state.data_ptr() for name, state in first._state.items()}
    before = {name: state.clone() for name, state in first._state.items()}
    first.run(token_ids(2, 1), torch.tensor([5]))
    assert not first._stores
    for name, state in first._state.items():
        assert state.data_ptr() == where[name]
        rows = (state != before[name]).any(-1).nonzero()[:, -1]
        assert set(rows.tolist()) == {5}


def test_a_fresh_executor_has_programs_of_its_own() -> None:
    first, _ = decoder()
    calls = [(token_ids(2, 1), torch.tensor([position])) for position in range(4)]
    wanted = [first.run(*call) for call in calls]
    other = first.fresh()
    assert all(torch.equal(other.run(*call), w) for call, w in zip(calls, wanted, strict=True))
    assert all(
        a.data_ptr() != b.data_ptr() and torch.equal(a, b)
        for a, b in zip(first._state.values(), other._state.values(), strict=True)
    )


def test_a_position_that_does_not_exist_is_an_error_that_names_the_step() -> None:
    first, _ = decoder()
    for position in range(3):
        first.run(token_ids(2, 1), torch.tensor([position]))
    with pytest.raises(RunError, match=r"aten.index_copy.default\) failed: an index is out of"):
        first.run(token_ids(2, 1), torch.tensor([10_000]))


def test_values_that_cannot_be_quantized_are_an_error_that_names_the_layer() -> None:
    first, _ = executors(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), (normal(3, 64),), {})
    x = normal(3, 64)
    for _ in range(3):
        first.run(x)
    assert programs_of(first)
    x[1, 7] = float("nan")
    with pytest.raises(NumericsError, match="layer '0'"):
        first.run(x)
    assert torch.isfinite(first.run(normal(3, 64))).all()


class Counting(nn.Module):
    """A model in which the values of a tensor decide about a size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return torch.nonzero(y > 0) + torch.zeros(1, dtype=torch.int64)


def test_sizes_that_depend_on_values_are_those_of_each_call() -> None:
    first, second = executors(Counting().eval(), (normal(4, 64),), {})
    require_equal(first, second, [normal(4, 64)], times=5)
    require_equal(first, second, [normal(4, 64) * 3 + 1], times=2)


def test_arguments_in_any_memory_layout() -> None:
    first, second = executors(nn.Sequential(nn.Linear(64, 48)), (normal(6, 64),), {})
    wide = normal(12, 130)
    for x in (wide[::2, 1:65], wide[:6, :64], normal(64, 6).T, normal(1, 64).expand(6, 64)):
        require_equal(first, second, [x], times=2)
    assert len(programs_of(first)) == 1


class Twice(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 32)) + y.reshape(-1, 32)


def test_one_tensor_given_twice_while_it_is_recorded() -> None:
    first, second = executors(Twice().eval(), (normal(4, 32), normal(4, 32)), {})
    x, y = normal(4, 32), normal(4, 32) + 1
    for call in [(x, x), (x, x), (x, y), (y, x), (x, x)]:
        assert torch.equal(first.run(*call), second.run(*call))
    assert programs_of(first)


def test_results_are_not_the_memory_of_the_next_call() -> None:
    first, _ = executors(nn.Sequential(nn.Linear(64, 48)), (normal(6, 64),), {})
    results = [first.run(normal(6, 64) * k) for k in range(1, 6)]
    copies = [result.clone() for result in results]
    first.run(normal(6, 64) * 9)
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))


def test_threads_may_run_the_same_program() -> None:
    model, args, kwargs = cases()["llama"].make()
    first, second = executors(model, args, kwargs)
    leaves = bind(first.plan.signature, args, kwargs)
    for _ in range(3):
        first.run_leaves(leaves)
    inputs = [[varied(leaf, number) for leaf in leaves] for number in range(4)]
    wanted = [second.run_leaves(own)[0] for own in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not torch.equal(first.run_leaves(inputs[number])[0], wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_few_programs_are_kept() -> None:
    first, _ = executors(nn.Sequential(nn.Linear(32, 16)), (normal(3, 32),), {})
    for rows in range(1, 60):
        for _ in range(2):
            first.run(normal(rows, 32))
    assert len(programs_of(first)) == 32
