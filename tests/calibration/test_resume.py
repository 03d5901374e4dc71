"""A visit that was stopped goes on where it was, and gives what it would have given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.calibration import Calibration, Group, InputStatistics
from tests.calibration.runs import CPU, equal, keep, visit
from tests.models import normal
from tests.programs import quantized

ROOT = Path(__file__).parents[2]


class Chain(nn.Module):
    """Five layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def chain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Chain().eval()


def program(scheme: str = "w4a6,skip=none", model: nn.Module | None = None):
    return quantized(model or chain(), normal(2, 32), scheme=scheme)


def calibration(folder: Path | None, memory: int = 1, **options) -> Calibration:
    batches = options.pop("batches", [(normal(rows, 32, seed=rows),) for rows in (3, 9)])
    return Calibration(batches, max_memory=memory, folder=folder, device=CPU, **options)


class StopError(Exception):
    """Ends work in the middle."""


class Counted:
    """Work that notes its groups, and stops before one of them."""

    def __init__(self, before: str = "") -> None:
        self.before = before
        self.done: list[str] = []

    def __call__(self, group: Group, statistics: InputStatistics) -> Mapping[str, Tensor]:
        if group.name == self.before:
            raise StopError
        self.done.append(group.name)
        return keep(group, statistics)


NAMES = [f"layers.{i}" for i in range(5)]


@pytest.mark.parametrize("memory", [1, 1 << 30], ids=["pieces", "one piece"])
@pytest.mark.parametrize("stop", [0, 2, 4])
def test_only_what_is_missing_is_done_again(memory: int, stop: int, tmp_path: Path) -> None:
    whole = visit(program(), calibration(None, memory))
    first, second, third = Counted(NAMES[stop]), Counted(), Counted()
    with pytest.raises(StopError):
        visit(program(), calibration(tmp_path, memory), first)
    results = visit(program(), calibration(tmp_path, memory), second)
    assert first.done == NAMES[:stop]
    assert second.done == NAMES[stop:]
    assert equal(results, whole)
    assert not list(tmp_path.glob("*/values/*"))
    assert equal(visit(program(), calibration(tmp_path, memory), third), whole)
    assert third.done == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    visit(program(), calibration(tmp_path))
    (place,) = tmp_path.iterdir()
    stale = place / "values" / "piece-0003"
    stale.mkdir(parents=True)
    visit(program(), calibration(tmp_path))
    assert not stale.exists()


def test_a_layer_changed_is_another_work(tmp_path: Path) -> None:
    def done(*, label: str = "keep", given=None, **options) -> int:
        work = Counted()
        visit(given or program(), calibration(tmp_path, **options), work, label)
        return len(work.done)

    changed = chain()
    changed.layers[3].weight.data[1, 1] += 1e-6
    assert done() == 5
    assert done() == 0
    assert done(given=program("w4a8,skip=none")) == 5
    assert done(given=program(model=changed)) == 5
    assert done(batches=[(normal(3, 32, seed=3),)]) == 5
    assert done(seed=1) == 5
    assert done(sample=7) == 5
    assert done(memory=1 << 20) == 5
    assert done(label="other{x=1}") == 5
    assert done() == 0
    assert len(list(tmp_path.iterdir())) == 8


def compiled(folder: Path, artifact: Path, progress) -> None:
    """Compile and save; what the subprocess does."""
    batches = [normal(9, 32, seed=i) for i in range(2)]
    model = fpcompiler.compile(
        chain(), "w4a6", calibration=batches, method="gptq", work_dir=folder, max_memory="10KiB",
        progress=progress,
    )  # fmt: skip
    model.save(artifact)


COMPILE = """
import sys
from pathlib import Path
from tests.calibration.test_resume import compiled

def noted(items, total, label):
    for item in items:
        print(label, flush=True)
        if label == "gptq":
            sys.stdin.readline()  # waits until it is told to go on, or is killed
        yield item

compiled(Path(sys.argv[1]), Path(sys.argv[2]), noted)
"""


class Steps:
    """Counts the steps of gptq."""

    count = 0

    def __call__(self, items, total, label):
        for item in items:
            self.count += label == "gptq"
            yield item


def killed(folder: Path, artifact: Path, steps: int) -> None:
    """Compile in a process that is killed after so many steps."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE, str(folder), str(artifact)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for step in range(steps):
        if step:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() == "gptq\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_was_killed_leaves_what_a_second_one_needs(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    # Five pieces, of two batches and a group each: the eighth step is within the third.
    killed(folder, tmp_path / "killed.fpc", 8)
    assert not (tmp_path / "killed.fpc").exists()
    results = {path: path.stat().st_mtime_ns for path in folder.glob("*/results/*.safetensors")}
    assert len(results) == 2
    assert list(folder.glob("*/values/*/*"))

    resumed, whole = Steps(), Steps()
    compiled(folder, tmp_path / "resumed.fpc", resumed)
    assert resumed.count == 9
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    compiled(tmp_path / "other", tmp_path / "whole.fpc", whole)
    assert whole.count == 15
    assert (tmp_path / "resumed.fpc").read_bytes() == (tmp_path / "whole.fpc").read_bytes()
    loaded = fpcompiler.load(tmp_path / "resumed.fpc")
    assert loaded.verify().ok
