"""A walk in a file: learned elsewhere, without the compiler, it gives the same."""

from __future__ import annotations

import math
import operator
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fpcompiler.errors import IRError
from fpcompiler.numerics.adaround import RoundOptions
from fpcompiler.reconstruction import Walk, load_walk, save_walk
from tests.calibration.runs import CPU, batches_for, equal
from tests.models import cases, normal
from tests.reconstruction.graphs import (
    WIDTH,
    Builder,
    aten,
    learnable,
    residual_blocks,
    run,
    settings,
    to_nearest,
    walk_of,
)

ROOT = Path(__file__).parents[2]


def test_a_walk_from_a_file_gives_the_same(tmp_path: Path) -> None:
    walk = walk_of(tmp_path / "here", seed=3, max_memory=40_000)
    save_walk(walk, tmp_path / "job.pt")
    loaded = load_walk(tmp_path / "job.pt", tmp_path / "there", device="cpu")
    assert loaded.settings == walk.settings
    assert [(u.name, u.weights) for u in loaded.units] == [(u.name, u.weights) for u in walk.units]
    places = [node.meta["place"] for node in loaded.module.graph.nodes if "fake" in node.name]
    assert places[0] == "layer 'blocks.0.up'"
    assert equal(run(loaded), run(walk))


def test_the_results_of_a_job_are_what_a_run_goes_on_with(tmp_path: Path) -> None:
    walk = walk_of(tmp_path / "here")
    save_walk(walk, tmp_path / "job.pt")
    results = run(load_walk(tmp_path / "job.pt", tmp_path / "there", device="cpu"))
    here, there = (tmp_path / name / "results" for name in ("here", "there"))
    shutil.copytree(there, here, dirs_exist_ok=True)

    def refuse(items: Any, total: int, label: str) -> Any:
        raise AssertionError("there is nothing to learn")

    assert equal(walk.run(refuse, "walk"), results)


@pytest.mark.parametrize("name", ["vit", "cached"])
def test_a_captured_model_travels(name: str, captured: Any, tmp_path: Path) -> None:
    """Sizes that are computed from inputs, and buffers that are written to at the end."""
    module, _ = learnable(captured(name))
    case = cases()[name]
    _, args, kwargs = case.make()
    batches = batches_for(captured(name), [(args, kwargs), *case.other_inputs()])
    options = RoundOptions(iterations=3)
    walk = Walk(module, to_nearest(module), batches, tmp_path / "a", settings(options=options))
    save_walk(walk, tmp_path / "job.pt")
    assert equal(run(load_walk(tmp_path / "job.pt", tmp_path / "b", device="cpu")), run(walk))


def test_plain_functions_of_numbers_travel(tmp_path: Path) -> None:
    build = Builder()
    x = build.input()
    rows = build.call("", aten.sym_size.int, x, 0)
    half = build.call("", math.floor, build.call("", operator.truediv, rows, 2))
    y = build.linear("fc", build.call("", aten.narrow.default, x, 0, 0, half), torch.eye(WIDTH))
    module = build.module(y)
    walk = walk_of(tmp_path / "a", module=module, iterations=2)
    save_walk(walk, tmp_path / "job.pt")
    loaded = load_walk(tmp_path / "job.pt", tmp_path / "b", device="cpu")
    x = normal(7, WIDTH)
    assert loaded.module(x)[0].shape == (3, WIDTH)
    assert torch.equal(loaded.module(x)[0], module(x)[0])


def custom(x: torch.Tensor) -> torch.Tensor:
    return x


def test_a_function_without_a_name_is_refused(tmp_path: Path) -> None:
    build = Builder()
    x = build.call("odd", custom, build.input())
    module = build.module(build.linear("fc", x, torch.eye(WIDTH)))
    walk = walk_of(tmp_path, module=module)
    with pytest.raises(IRError, match=r"layer 'odd': <function custom.*cannot be saved in a job"):
        save_walk(walk, tmp_path / "job.pt")
    assert not (tmp_path / "job.pt").exists()


ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch_mlir", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
from pathlib import Path
from fpcompiler.reconstruction import load_walk

walk = load_walk(sys.argv[1], Path(sys.argv[2]), device="cpu")
walk.run(lambda items, total, label: items, "job")
assert "torch_mlir" not in sys.modules
"""


def test_a_job_needs_no_compiler(tmp_path: Path) -> None:
    module = residual_blocks(1)
    walk = walk_of(tmp_path / "here", module=module, iterations=5)
    save_walk(walk, tmp_path / "job.pt")
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "job.pt"), str(tmp_path / "there")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    there = load_walk(tmp_path / "job.pt", tmp_path / "there", device="cpu")
    assert there.settings.device == CPU
    # The last bits of products, and so the codes, may depend on the threads of a process.
    for name, result in run(walk).items():
        assert result["errors"][0] == pytest.approx(float(run(there)[name]["errors"][0]), rel=1e-4)
