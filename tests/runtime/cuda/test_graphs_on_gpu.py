"""Calls that are replayed as CUDA graphs on a Hopper GPU, beside the same calls step by step.

``gpu_bundle.py`` builds the kernels and models elsewhere.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.runtime.cuda import capture
from fpcompiler.runtime.cuda.capture import CudaRecorder
from fpcompiler.runtime.cuda.graphs import GraphCache, GraphOptions
from fpcompiler.runtime.loading import load
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.tree import flatten
from tests.runtime.cuda.gpu_bundle import DECODER, PACKED
from tests.runtime.cuda.test_on_gpu import CUDA, normal

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]


def opened(folder: Path, name: str, graphs: bool | GraphOptions | None = None) -> CompiledModel:
    return load(folder / f"{name}.fpc", device="cuda", trust=True, graphs=graphs)


def ids(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 90, (rows, length), generator=generator).to(CUDA)


def outputs(model: CompiledModel, *args: Any) -> list[Tensor]:
    return flatten(model.artifact.plan.signature.outputs, model(*args), "outputs")


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("name", PACKED)
def test_replays_are_bit_for_bit_the_steps(folder: Path, name: str) -> None:
    plain, fast = (opened(folder, f"packed-{name}", graphs) for graphs in (False, None))
    assert plain.graphs == ()
    for seed in range(6):
        x = ids(2, 12, seed)
        assert same(outputs(plain, x), outputs(fast, x)), seed
    (row,) = fast.graphs
    assert (row.recorded, row.replays, row.reason) == (True, 4, "")


def test_inputs_with_gaps_are_copied(folder: Path) -> None:
    plain, fast = (opened(folder, "packed-i8", graphs) for graphs in (False, None))
    for seed in range(4):
        wide = ids(2, 24, seed)[:, ::2]
        assert same(outputs(plain, wide.contiguous()), outputs(fast, wide))


def greedy(model: CompiledModel, prompt: Tensor, count: int) -> tuple[list[int], list[Tensor]]:
    model.reset()
    length = prompt.shape[1]
    tokens, seen = prompt, []
    found: list[int] = []
    position = torch.arange(length, device=CUDA)
    for step in range(count):
        logits = model(tokens, position)
        seen.append(logits)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(tokens))
        position = torch.tensor([length + step], device=CUDA)
    return found, seen


def test_greedy_decoding_is_one_graph(folder: Path) -> None:
    plain, fast = (opened(folder, DECODER, graphs) for graphs in (False, None))
    for seed, length in ((0, 9), (1, 17), (2, 5)):
        prompt = ids(1, length, seed)
        expected, found = greedy(plain, prompt, 21), greedy(fast, prompt, 21)
        assert expected[0] == found[0]
        assert same(expected[1], found[1])
    recorded = [row for row in fast.graphs if row.recorded]
    assert [(row.sizes, row.replays) for row in recorded] == [(((1, 1), (1,)), 58)]
    assert not any(row.reason for row in fast.graphs)


def test_what_torch_compile_made_is_one_graph_too(folder: Path) -> None:
    plain, fast = (opened(folder, DECODER, graphs) for graphs in (False, None))
    fast.compile_rest()
    prompt = ids(1, 9, 0)
    expected, found = greedy(plain, prompt, 21)[1], greedy(fast, prompt, 21)[1]
    # Inductor rounds to bf16 less often, and one other token changes all that follow.
    assert float((expected[0] - found[0]).norm() / expected[0].norm()) < 0.05
    recorded = [row for row in fast.graphs if row.recorded]
    assert [(row.sizes, row.replays) for row in recorded] == [(((1, 1), (1,)), 18)]
    assert not any(row.reason for row in fast.graphs)


def test_prompts_of_many_lengths_are_not_recorded(folder: Path) -> None:
    plain, fast = (opened(folder, DECODER, graphs) for graphs in (False, None))
    for length in range(2, 40):
        prompt = ids(1, length, length)
        assert same(greedy(plain, prompt, 1)[1], greedy(fast, prompt, 1)[1])
    assert not any(row.recorded for row in fast.graphs)


def test_copies_of_outputs_stay_and_static_ones_do_not(folder: Path) -> None:
    prompt = ids(1, 1, 0), torch.zeros(1, dtype=torch.int64, device=CUDA)
    other = ids(1, 1, 7), torch.zeros(1, dtype=torch.int64, device=CUDA)
    for copies in (True, False):
        model = opened(folder, DECODER, GraphOptions(copies=copies))
        for _ in range(2):
            model(*prompt)
        first = model(*prompt)
        kept = first.clone()
        second = model(*other)
        assert torch.equal(first, kept) == copies
        assert (first.data_ptr() == second.data_ptr()) != copies


def test_nan_after_a_replay_names_the_layer(folder: Path) -> None:
    model = opened(folder, "mlp-a6")
    x = normal(4, 200).to(CUDA)
    before = [model(x)["logits"] for _ in range(3)][-1]
    bad = x.clone()
    bad[2, 3] = torch.inf
    for _ in range(2):
        with pytest.raises(NumericsError, match="layer 'up': input holds NaN"):
            model(bad)
        assert torch.equal(model(x)["logits"], before)
    assert [row.replays for row in model.graphs] == [5]


def test_nan_is_the_error_of_the_thread_that_gave_it(folder: Path) -> None:
    """Some of them replay graphs that others have recorded."""
    model = opened(folder, "mlp-a6")
    good = normal(4, 200).to(CUDA)
    bad = good.clone()
    bad[2, 3] = torch.inf
    expected = model(good)["logits"]

    def calls(number: int) -> list[bool]:
        found = []
        for step in range(60):
            wrong = (step + number) % 3 == 0
            try:
                same_bits = torch.equal(model(bad if wrong else good)["logits"], expected)
                found.append(same_bits and not wrong)
            except NumericsError:
                found.append(wrong)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(calls, range(4)))


def test_nan_while_recording_is_an_error_too(folder: Path) -> None:
    model = opened(folder, "mlp-a6")
    x = normal(4, 200).to(CUDA)
    before = model(x)["logits"]
    with pytest.raises(NumericsError, match="layer 'up'"):
        model(torch.full_like(x, torch.nan))
    for _ in range(3):
        assert torch.equal(model(x)["logits"], before)
    assert [row.replays for row in model.graphs] == [2]


def test_sizes_change_and_graphs_go(folder: Path) -> None:
    plain = opened(folder, "packed-i8", False)
    fast = opened(folder, "packed-i8", GraphOptions(most=3))
    for turn in range(4):
        for length in (3, 12, 40, 12, 7, 3, 64):
            x = ids(2, length, turn)
            assert same(outputs(plain, x), outputs(fast, x)), (turn, length)
    assert 1 <= sum(row.recorded for row in fast.graphs) <= 3
    assert sum(row.replays for row in fast.graphs) > 4


def test_graphs_that_take_too_much_are_given_up(folder: Path) -> None:
    model = opened(folder, "packed-i8", GraphOptions(share=1e-12))
    found = [outputs(model, ids(2, 12, 0)) for _ in range(5)]
    assert all(same(found[0], other) for other in found)
    (row,) = model.graphs
    assert "bytes, and graphs may take 0" in row.reason
    reserved = torch.cuda.memory_reserved()
    for length in range(20, 30):
        for _ in range(3):
            model(ids(2, length, 0))
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + (64 << 20)


def test_two_models_take_turns(folder: Path) -> None:
    names = ("packed-i8", "packed-nv", "packed-plain")
    models = [(opened(folder, name, False), opened(folder, name)) for name in names]
    streams = [torch.cuda.Stream() for _ in models]
    inputs = [ids(2, 12, seed) for seed in range(8)]
    expected, found = [], []
    for x in inputs:
        for (plain, fast), stream in zip(models, streams, strict=True):
            expected.append(outputs(plain, x))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(outputs(fast, x))
    torch.cuda.synchronize()
    assert all(map(same, expected, found))


def test_copies_of_the_state_are_independent(folder: Path) -> None:
    executor = opened(folder, DECODER)._ready()
    first, second = executor.fresh(), executor.fresh()
    tokens = ids(1, 8, 3)
    results = []
    for own in (first, second):
        calls = [(tokens[:, i : i + 1], torch.tensor([i], device=CUDA)) for i in range(8)]
        results.append([own.run_leaves(call)[0] for call in calls])
    assert same(*results)
    assert executor.graphs is not None
    assert executor.graphs.rows() == ()


def test_calls_in_inference_mode_and_outside_share_a_graph(folder: Path) -> None:
    plain, fast = (opened(folder, "packed-i8", graphs) for graphs in (False, None))
    for seed in range(6):
        x = ids(2, 12, seed)
        with torch.inference_mode(seed % 2 == 1):
            assert same(outputs(plain, x), outputs(fast, x))


def test_without_kernels_nothing_is_captured(folder: Path) -> None:
    model = load(folder / "packed-i8.fpc", device="cuda", kernels=False, graphs=True)
    found = [outputs(model, ids(2, 12, 0)) for _ in range(4)]
    assert all(same(found[0], other) for other in found)
    (row,) = model.graphs
    assert "has no kernel for this GPU and checks its values" in row.reason


def test_the_environment_switches_graphs_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPC_GRAPHS", "0")
    model = opened(folder, "packed-i8")
    for _ in range(3):
        model(ids(2, 12, 0))
    assert model.graphs == ()


@pytest.mark.parametrize(
    "breaks",
    [
        lambda x: x * x.sum().item(),  # CUDA ends the capture
        lambda x: x[:, : 1 // (torch.cuda.is_current_stream_capturing() - 1)],  # Python does
    ],
)
def test_a_capture_that_fails_leaves_torch_as_it_was(
    breaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "why_waits", lambda *_: "")
    cache = GraphCache(GraphOptions(), CudaRecorder(CUDA))
    x = normal(3, 5).to(CUDA)

    def run(leaves: Sequence[Tensor]) -> list[Any]:
        return [breaks(leaves[0])]

    found = [cache.run([x], run, list, run)[0] for _ in range(4)]
    assert all(torch.equal(found[0], other) for other in found)
    (row,) = cache.rows()
    assert row.reason
    assert not row.recorded
    # The generator, the allocator and later captures work.
    torch.cuda.synchronize()
    assert torch.randn(1 << 20, device=CUDA).isfinite().all()
    torch.cuda.empty_cache()
    assert not torch.cuda.is_current_stream_capturing()

    def plus_one(leaves: Sequence[Tensor]) -> list[Any]:
        return [leaves[0] + 1]

    good = [cache.run([x[:2]], plus_one, list, plus_one)[0] for _ in range(4)]
    assert all(torch.equal(result, x[:2] + 1) for result in good)
    assert cache.rows()[-1].replays == 2
