"""A walk over all units: never worse than rounding to nearest, repeatable, and it goes on."""

from __future__ import annotations

import operator
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fpcompiler.errors import NumericsError, RunError
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.numerics.adaround import Ended, RoundOptions
from fpcompiler.operand import Operand
from fpcompiler.reconstruction import Walk, fake_quantize, find_units
from fpcompiler.reconstruction.samples import StoredSamples
from fpcompiler.reconstruction.subgraph import UnitFunction
from fpcompiler.streams import Result, Spill
from tests.calibration.runs import CPU, equal
from tests.models import normal
from tests.numerics.adaround.problems import correlated
from tests.reconstruction.graphs import (
    WEIGHT,
    WIDTH,
    Builder,
    aten,
    learned,
    residual_blocks,
    run,
    to_nearest,
    tokens,
    values_of,
    walk_of,
)


class StopError(Exception):
    """Ends a walk in the middle."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What an unbroken walk in memory gives."""
    return run(walk_of(tmp_path_factory.mktemp("whole")))


def errors(results: dict[str, Result]) -> dict[str, list[float]]:
    return {name: result["errors"].tolist() for name, result in results.items()}


def test_every_unit_gains_on_what_was_held_out(whole: dict[str, Result]) -> None:
    assert list(whole) == ["blocks.0", "blocks.1", "head"]
    for nearest, learned_error in errors(whole).values():
        assert learned_error < 0.8 * nearest
    assert all(bool(result["kept"]) for result in whole.values())
    assert all(int(result["iterations"]) > 0 for result in whole.values())


def test_the_errors_are_those_of_the_codes(whole: dict[str, Result], tmp_path: Path) -> None:
    """Targets come from the original model, inputs from the one whose units before are rounded."""
    walk = walk_of(tmp_path)
    (held_out,) = walk._held_out
    original, quantized = residual_blocks(), residual_blocks()
    for node in list(original.graph.nodes):
        if node.target is fake_quantize:
            node.replace_all_uses_with(node.args[0])
    targets = {n.name: v for n, v in values_of(original, walk.batches[held_out]).items()}
    k = {name: getattr(quantized, name).shape[-1] for name in walk.rounding}
    for unit in walk.units:
        for name, value in learned(unit, whole[unit.name], dict(walk.rounding), k).items():
            setattr(quantized, name, value)
        found = {n.name: v for n, v in values_of(quantized, walk.batches[held_out]).items()}
        (output,) = unit.outputs
        error = (found[output.name] - targets[output.name]).square().mean()
        assert float(error) == pytest.approx(whole[unit.name]["errors"].tolist()[1], rel=1e-5)


def test_a_seed_decides_and_nothing_else(whole: dict[str, Result], tmp_path: Path) -> None:
    assert equal(run(walk_of(tmp_path / "again")), whole)
    other = run(walk_of(tmp_path / "other", seed=1))
    assert not equal(other, whole)


def test_results_are_all_that_stays(tmp_path: Path) -> None:
    run(walk_of(tmp_path, max_memory=1))
    files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"results"}


@pytest.mark.parametrize("memory", [1, 40_000], ids=["on disk", "partly in memory"])
def test_samples_on_disk_give_the_same(
    memory: int, whole: dict[str, Result], tmp_path: Path
) -> None:
    walk = walk_of(tmp_path, max_memory=memory)
    written = count_writes(walk)
    assert equal(run(walk), whole)
    assert 0 < len(written) < 16 if memory > 1 else len(written) == 15


def count_writes(walk: Walk) -> list[int]:
    """Note each sample that goes to disk."""
    written: list[int] = []
    spill = walk._samples
    before = spill.write

    def write(piece: int, batch: int, environment: Any) -> None:
        written.append(piece)
        before(piece, batch, environment)

    spill.write = write  # type: ignore[method-assign]
    return written


def stopped_after(units: int) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    """Return a progress bar that stops after so many units."""

    def progress(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        for number, item in enumerate(items, 1):
            yield item
            if number == units:
                raise StopError

    return progress


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("memory", [1, 1 << 30], ids=["on disk", "in memory"])
def test_a_walk_that_was_stopped_goes_on(
    units: int, memory: int, whole: dict[str, Result], tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        walk_of(tmp_path, max_memory=memory).run(stopped_after(units), "walk")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert len(done) == units
    counted = []

    def progress(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        counted.append(total)
        return iter(items)

    assert equal(walk_of(tmp_path, max_memory=memory).run(progress, "walk"), whole)
    assert counted == [3 - units][: 3 - units]
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    require_clean(tmp_path)


@pytest.mark.parametrize("write", [*range(0, 35, 7), 34])
def test_a_walk_that_was_stopped_anywhere_goes_on(
    write: int, whole: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends before any of the files it writes: in a unit, or on the way to the next one."""
    left, before = write, Spill.write

    def stopping(self: Spill, piece: int, batch: int, environment: Any) -> None:
        nonlocal left
        if not left:
            raise StopError
        left -= 1
        before(self, piece, batch, environment)

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "write", stopping)
        with pytest.raises(StopError):
            run(walk_of(tmp_path, max_memory=1))
    assert equal(run(walk_of(tmp_path)), whole)
    require_clean(tmp_path)


def require_clean(folder: Path) -> None:
    assert {path.parent.name for path in folder.rglob("*") if path.is_file()} == {"results"}


def damage_all(folder: Path) -> None:
    for file in folder.rglob("batch-*"):
        file.write_bytes(file.read_bytes()[:40])


def delete_one(folder: Path) -> None:
    next(folder.rglob("batch-00002*")).unlink()


def delete_all(folder: Path) -> None:
    for name in ("original", "quantized"):
        shutil.rmtree(folder / name)


@pytest.mark.parametrize("harm", [damage_all, delete_one, delete_all])
def test_files_that_are_lost_are_made_again(
    harm: Callable[[Path], None], whole: dict[str, Result], tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        walk_of(tmp_path).run(stopped_after(2), "walk")
    harm(tmp_path)
    assert equal(run(walk_of(tmp_path)), whole)
    require_clean(tmp_path)


def test_a_damaged_result_is_learned_again(whole: dict[str, Result], tmp_path: Path) -> None:
    walk = walk_of(tmp_path)
    run(walk)
    path = walk._results._path("blocks.1")
    path.write_bytes(path.read_bytes()[:100])
    assert equal(run(walk_of(tmp_path)), whole)
    require_clean(tmp_path)


def test_values_of_other_codes_are_not_gone_on_with(tmp_path: Path) -> None:
    """With a limit of time, a unit that is learned again may have other codes than before."""
    with pytest.raises(StopError):
        walk_of(tmp_path / "a").run(stopped_after(2), "walk")
    shutil.rmtree(tmp_path / "a" / "results")
    results = run(walk_of(tmp_path / "a", iterations=5))
    assert equal(results, run(walk_of(tmp_path / "b", iterations=5)))


def test_a_walk_that_was_stopped_behind_its_last_unit_is_cleared(
    whole: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = walk_of(tmp_path, max_memory=1)

    def stop(number: int) -> None:
        if number == 2:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(walk._samples, "forget", stop)
        with pytest.raises(StopError):
            run(walk)
    assert (tmp_path / "quantized").exists()
    assert equal(run(walk_of(tmp_path)), whole)
    require_clean(tmp_path)


def test_inputs_may_be_learned_without_quantization(
    whole: dict[str, Result], tmp_path: Path
) -> None:
    results = run(walk_of(tmp_path / "float", quantized_inputs=False))
    assert all(learned < nearest for nearest, learned in errors(results).values())
    assert errors(results)["blocks.0"] != errors(whole)["blocks.0"]
    # Where nothing is quantized but weights, there is no difference.
    plain = remove_quantization(residual_blocks())
    both = [
        run(walk_of(tmp_path / str(on), module=plain, quantized_inputs=on)) for on in (True, False)
    ]
    assert equal(both[0], both[1])
    assert equal(both[0], results)


def remove_quantization(module: fx.GraphModule) -> fx.GraphModule:
    for node in list(module.graph.nodes):
        if node.target is fake_quantize:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


def test_a_time_limit_is_kept(tmp_path: Path) -> None:
    options = RoundOptions(iterations=10**6, patience=0)
    start = time.monotonic()
    results = run(walk_of(tmp_path, options=options, seconds=0.9))
    assert 0.3 < time.monotonic() - start < 3  # other work may share the processor
    ended = {list(Ended)[int(result["ended"])] for result in results.values()}
    assert ended == {Ended.TIME}
    assert all(1 <= int(result["iterations"]) < 10**5 for result in results.values())


def test_one_batch_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="at least two batches of calibration data"):
        walk_of(tmp_path, batches=tokens(1))
    assert len(run(walk_of(tmp_path, batches=tokens(2)))) == 3


def test_batches_of_different_length_and_dtype(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        batches = [(batch[0][: 3 + 7 * i],) for i, batch in enumerate(tokens(dtype=dtype))]
        module = residual_blocks(dtype=dtype)
        results = run(walk_of(tmp_path / str(dtype), module=module, batches=batches))
        assert all(learned <= nearest for nearest, learned in errors(results).values())
        assert sum(bool(result["kept"]) for result in results.values()) >= 2


def test_a_value_that_is_no_number_is_reported_with_its_place(tmp_path: Path) -> None:
    bad = residual_blocks()
    bad.weight3[1, 1] = torch.nan
    scales = to_nearest(residual_blocks())
    walk = walk_of(tmp_path / "w")
    with pytest.raises(NumericsError, match="weight3"):
        run(Walk(bad, scales, walk.batches, tmp_path / "a", walk.settings))
    batches = tokens()
    batches[2][0][3, 3] = torch.inf
    with pytest.raises(NumericsError, match=r"blocks\.0\.up"):
        run(walk_of(tmp_path / "b", batches=batches))
    plain = remove_quantization(residual_blocks())
    with pytest.raises(NumericsError, match=r"blocks\.0'.* holds NaN/Inf"):
        run(walk_of(tmp_path / "c", module=plain, batches=batches))


def test_a_batch_that_does_not_fit_is_named(tmp_path: Path) -> None:
    batches = [*tokens(3), (normal(4, WIDTH + 1),)]
    with pytest.raises(RunError, match="cannot run on the calibration data") as raised:
        run(walk_of(tmp_path, module=remove_quantization(residual_blocks()), batches=batches))
    assert "in calibration batch 4" in raised.value.__notes__


def streams(big: int, small: int) -> tuple[fx.GraphModule, list[tuple[Tensor, Tensor]]]:
    """Return a block of two streams of different size and length."""
    build = Builder()
    x, y = build.input("x"), build.input("y")
    both = build.call("blocks.0", aten.cat.default, [x, y])
    both = build.linear("blocks.0.fc", both, normal(WIDTH, WIDTH, seed=3) / 4, "")
    parts = build.call("blocks.0", aten.split_with_sizes.default, both, [big, small])
    outs = []
    for number, own in enumerate((x, y)):
        part = build.call("blocks.0", operator.getitem, parts, number)
        outs.append(build.call("blocks.0", aten.add.Tensor, own, part))
    batches = [
        (3 * correlated(big, WIDTH, 2 * i), correlated(small, WIDTH, 50 + 2 * i)) for i in range(6)
    ]
    return build.module(*outs), batches


def test_several_outputs_are_equally_important(tmp_path: Path) -> None:
    module, batches = streams(60, 4)
    (unit,) = find_units(module.graph, {"weight0"})
    assert len(unit.outputs) == 2
    function = UnitFunction(module, unit, CPU, frozenset())
    found = values_of(module, batches[0])
    targets = [found[node] for node in unit.outputs]
    joined = function.joined(targets)
    assert joined.shape == (64 * WIDTH,)
    parts = joined.split([60 * WIDTH, 4 * WIDTH])
    squares = [float(part.square().sum()) for part in parts]
    assert squares[0] == pytest.approx(squares[1], rel=1e-4)
    assert float(joined.square().mean()) == pytest.approx(1, rel=1e-4)
    # The factors stay: a later call is compared with the first.
    assert torch.allclose(function.joined([3 * target for target in targets]), 3 * joined)
    (result,) = run(walk_of(tmp_path, module=module, batches=batches)).values()
    assert result["errors"][1] < result["errors"][0]


def test_samples_keep_no_more_than_themselves(tmp_path: Path) -> None:
    """Views would keep what they are views of, in memory, and have another layout than on disk."""
    large = normal(64, 64)
    samples = [StoredSamples(Spill(tmp_path), n, room, CPU) for n, room in enumerate((10**6, 0))]
    inputs = [large[:2], normal(1, 8).expand(5, 8), normal(4, 6).T, torch.arange(3), 7, 0.5, True]
    for kept in samples:
        kept.add(0, inputs, large[3])
    (ours, target), (theirs, other) = (kept.batch([0]) for kept in samples)
    assert torch.equal(target, large[3])
    assert torch.equal(other, large[3])
    assert ours[4:] == theirs[4:] == (7, 0.5, True)
    for value, one, two in zip(inputs[:4], ours, theirs, strict=False):
        assert torch.equal(one, value)
        assert torch.equal(two, value)
        assert one.stride() == two.stride()
        assert one.dtype == two.dtype
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
    assert samples[0].room == 10**6 - 4 * (128 + 40 + 24 + 64) - 24
    assert samples[1].room == 0


def test_a_unit_that_cannot_run_alone_is_named() -> None:
    module = residual_blocks()
    unit = find_units(module.graph, {"weight0", "weight1"})[0]
    function = UnitFunction(module, unit, CPU, frozenset())
    with pytest.raises(RunError, match=r"unit 'blocks\.0' cannot run on its own"):
        function([module.weight0, module.weight1], (normal(2, 3), normal(2, 3)))


def test_weights_in_no_unit_are_rounded_to_nearest_on_the_way(tmp_path: Path) -> None:
    """A weight that two blocks share is part of the model that the later units see."""
    build = Builder()
    x = build.input()
    build.root.register_buffer("weight9", normal(WIDTH, WIDTH, seed=9) / 4)
    shared = build.graph.get_attr("weight9")
    for number in range(2):
        name = f"blocks.{number}"
        y = build.linear(f"{name}.up", x, normal(WIDTH, WIDTH, seed=number) / 4, "")
        y = build.call(f"{name}.down", aten.linear.default, y, shared)
        x = build.call(name, aten.add.Tensor, x, y)
    module = build.module(x)
    walk = walk_of(tmp_path, module=module)
    assert [unit.weights for unit in walk.units] == [("weight0",), ("weight1",)]
    results = run(walk)
    operand = Operand.parse(str(WEIGHT))
    rounded = dequantize(*quantize(module.weight9, operand), operand)
    assert set(results) == {"blocks.0", "blocks.1"}
    assert torch.equal(walk._weights["weight9"], rounded)
