"""A walk stays within the memory that it was given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, tempfile
from pathlib import Path

from fpcompiler.reconstruction import Walk
from tests.models import normal
from tests.reconstruction.graphs import Builder, aten, run, settings, to_nearest

WIDTH = 256


def blocks():
    build = Builder()
    x = build.input()
    for number in range(2):
        name = f"blocks.{number}"
        y = build.linear(f"{name}.up", x, normal(WIDTH, WIDTH) / 16)
        y = build.call(name, aten.relu.default, y)
        y = build.linear(f"{name}.down", y, normal(WIDTH, WIDTH) / 16)
        x = build.call(name, aten.add.Tensor, x, y)
    return build.module(x)


def peak():
    # Not ru_maxrss: it counts what the process was before exec, a copy of the one that runs pytest.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def walk(batches, memory):
    module = blocks()
    given = settings(iterations=6, max_memory=memory)
    with tempfile.TemporaryDirectory() as folder:
        run(Walk(module, to_nearest(module), batches, Path(folder), given))


batches = [(normal(512, WIDTH, seed=i),) for i in range(96)]
walk(batches[:2], 1)
before = peak()
walk(batches, int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_samples_take_no_more_than_they_may() -> None:
    memory = 16 << 20
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(memory)],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    # The samples of a unit take 144 MiB; a batch on its way through a block a few more.
    assert int(done.stdout) < 3 * memory
