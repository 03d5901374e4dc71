"""Calibration stays within the memory that it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from torch import nn

from fpcompiler.calibration import Calibration
from tests.calibration.runs import CPU, program_for, visit
from fpcompiler.capture import capture

WIDTH, LAYERS = 1024, 16
model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
batches = [(torch.randn(64, WIDTH),) for _ in range(3)]
program = program_for(capture(model.eval(), batches[0]))
memory = int(sys.argv[1])


def peak():
    # Not ru_maxrss: it counts what the process was before exec, a copy of the one that runs pytest.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def work(group, statistics):
    return {"trace": statistics.gram.trace()}


visit(program, Calibration(batches, max_memory=1, device=CPU, sample=64), work, "warm up")
before = peak()
calibration = Calibration(batches, max_memory=memory, device=CPU, sample=64)
results = visit(program, calibration, work)
print(json.dumps({"growth": peak() - before, "groups": len(results)}))
"""


def growth(memory: int) -> int:
    """Return how much the peak of a process grows while it calibrates 16 layers."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(memory)],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["groups"] == 16
    return int(result["growth"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_stays_below_what_was_given() -> None:
    memory = 32 << 20
    # The statistics of all layers together take 68 MiB; more than one layer's are held at a time.
    assert 4 << 20 < growth(memory) < 1.15 * memory
