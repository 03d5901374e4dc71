"""Loading and running take less memory than the weights in fp32."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpcompiler.artifact import Artifact, save
from fpcompiler.plan import Parameter, Placeholder, Plan, Signature, Step
from fpcompiler.tree import LEAF
from tests.plans import WEIGHT, value

N, K, LAYERS = 4096, 4096, 4
SCRIPT = """
import sys
from pathlib import Path
import torch
from fpcompiler.runtime.loading import load

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.ops.fpc.quantize(torch.ones(1, 32), "f4E2M1FN@row:f32", "")  # Loads what is loaded lazily.
Path("/proc/self/clear_refs").write_text("5")  # From here on the peak counts anew.
before = peak()
model = load(sys.argv[1])
model(torch.ones(2, 4096))
print(peak() - before)
"""


def large_artifact() -> Artifact:
    """Return four layers of 64 MiB each in fp32, with arbitrary codes."""
    tensors, steps = {}, []
    for layer in range(LAYERS):
        tensors |= {
            f"{layer}.w0": torch.randint(0, 255, (N, K // 2), dtype=torch.uint8),
            f"{layer}.w1": torch.ones(N, 1),
            f"{layer}.w2": torch.full((N, K // 32), 120, dtype=torch.uint8),
        }
        weights = [value(f"{layer}.w{i}") for i in range(3)]
        args = (
            [value(f"x{layer}")],
            weights,
            None,
            "",
            WEIGHT,
            K,
            {"dtype": "float32"},
            str(layer),
        )
        steps.append(Step("fpc.linear", args, (f"x{layer + 1}",), {}, str(layer)))
    plan = Plan(
        Signature((Parameter("x", LEAF),), LEAF),
        (Placeholder("x0", "float32", (2, K)),),
        tuple(steps),
        (f"x{LAYERS}",),
        constants={key: key for key in tensors},
    )
    return Artifact(plan, tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_and_run_stay_below_the_weights_in_fp32(tmp_path):
    path = tmp_path / "large.fpc"
    save(path, large_artifact())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    peak, stored, dense = int(done.stdout), path.stat().st_size, N * K * 4 * LAYERS
    assert stored < 0.15 * dense
    # The mapped file counts as memory once it was read; what is expanded at a time is one chunk.
    assert stored // 2 < peak < stored + 64 * 2**20 < dense / 2
